"""The sizes of one measurement. Read for the arguments of `alignsae bench` too, hence without torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """B rows, D width, K free slots in banks of `bank_slots`, R concepts, and the mean of active free slots per row."""

    rows: int = 1024
    width: int = 768
    slots: int = 100_000
    bank_slots: int = 8_192
    concepts: int = 6
    answers: int = 64
    l0: float = 64.0
    device: str = "cpu"
    seed: int = 0
    gate: str = "relu"

    @property
    def state_bytes(self) -> int:
        """fp32 weights, gradients and two Adam moments of encoder and decoder, and a bf16 copy of the encoder."""
        matrix = (self.slots + self.concepts) * self.width
        vectors = self.slots + self.concepts + self.width
        return 4 * 4 * (2 * matrix + vectors) + 2 * matrix

    def refuse(self, copies: int, products: int) -> str | None:
        """Why `copies` training states and `products` fp32 [B, S] blocks do not fit the device's memory, or None."""
        needed = copies * self.state_bytes + products * 4 * self.rows * (self.slots + self.concepts)
        free = free_memory(self.device)
        if free is None or needed <= 0.95 * free:
            return None
        return (
            f"needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "take fewer --slots or a smaller --width"
        )


def free_memory(device: str) -> int | None:
    """Bytes that a process can still take on the device; None where the system does not say."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
