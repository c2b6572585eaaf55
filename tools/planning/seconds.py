"""Seconds of a step on a device, reckoned from the bytes and operations of each kernel: arithmetic, not a measurement.

A kernel takes what its arithmetic takes, or its bytes if that is more, at the shares of the device's figures that
large products and streams usually reach (REACHED); kernels follow each other. Activations and gradients of rows that
entries gather come from the second-level cache where half of it holds them, one after the other with what comes from
memory; weights that entries gather come from memory. The kernels are those of trainer/kernels/triton, with bf16
products.
"""

from dataclasses import dataclass, replace

from tools.planning.estimate import FP32, Estimate, Workload

BF16 = 2
BITS = 8  # in a byte


@dataclass(frozen=True)
class Device:
    """Makers' figures of one device: dense bf16 operations, bytes of memory, and bytes sent to others of its node, all
    per second; bytes of the second-level cache."""

    operations: float
    memory: float
    link: float
    cache: float


DEVICES = {
    "a100": Device(312e12, 2.04e12, 300e9, 40 << 20),
    "h100": Device(989e12, 3.35e12, 450e9, 50 << 20),
    "h200": Device(989e12, 4.80e12, 450e9, 50 << 20),
    "b200": Device(2250e12, 8.00e12, 900e9, 126 << 20),
}
REACHED = Device(0.70, 0.85, 0.70, 0.50)  # of these figures
# Bytes a second from that cache, an assumption: no maker names it, and what was measured and published for an H100 lies
# there or above. Where memory gives more, as much as memory.
CACHE_RATE = 5.5e12


@dataclass(frozen=True)
class Kernel:
    """What one or several launches move and compute: bytes from and to memory, operations of the matrix units, and
    bytes gathered out of matrices of `among` bytes in all."""

    name: str
    bytes: float
    operations: float = 0.0
    gathered: float = 0.0
    among: float = 0.0

    def seconds(self, device: Device) -> float:
        """On this device."""
        memory = device.memory * REACHED.memory
        fits = self.among <= device.cache * REACHED.cache
        gathering = self.gathered / (max(CACHE_RATE, memory) if fits else memory)
        return max(self.operations / (device.operations * REACHED.operations), self.bytes / memory + gathering)


def kernels(work: Workload, strategy: str, devices: int, l0: float) -> list[Kernel]:
    """Of one rank, in order; l0: mean active free slots of a row."""
    split_rows = strategy != "dictionary"
    rows = work.rows / devices if split_rows else work.rows
    free = work.form.free_slots / (1 if split_rows else devices)
    width = work.form.width
    matrix, entries = free * width, rows * l0 * (free / work.form.free_slots)
    bits = 2 * rows * free / BITS
    row, half_row = FP32 * width, BF16 * width
    updated = float(work.free() + work.shared)
    if strategy == "dictionary" or strategy.startswith("zero"):
        updated = updated / devices
    return [
        Kernel("encoder rows to bf16, their norms", (FP32 + BF16) * matrix),
        Kernel("encoder product and bits", BF16 * matrix + BF16 * rows * width + bits, 2 * rows * matrix),
        Kernel("entries from bits, by slot and by row", 2 * bits + 4 * FP32 * entries),
        Kernel("pre-activations again, in fp32", FP32 * matrix, gathered=row * entries, among=row * rows),
        Kernel("decoder", row * entries + 2 * row * rows),
        Kernel(
            "gradients and their squares",
            3 * FP32 * matrix + (row + half_row) * rows,
            gathered=2 * half_row * entries,
            among=2 * half_row * rows,
        ),
        Kernel("AdamW", (4 * FP32 + 4 * work.moment - FP32) * updated),
    ]


FLOOR = ("encoder product and bits", "AdamW")  # what no step can avoid


@dataclass(frozen=True)
class Step:
    """Seconds of a step and of its floor, of what is sent, which nothing hides here, and of the kernels if no cache
    held anything."""

    floor: float
    kernels: float
    sent: float
    uncached: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.kernels + self.sent


def step(work: Workload, found: Estimate, device: Device, l0: float) -> Step:
    """Of a strategy on as many devices as the estimate is for."""
    visited = kernels(work, found.strategy, found.devices, l0)
    each = {k.name: k.seconds(device) for k in visited}
    sent = sum(found.sent.values()) / (device.link * REACHED.link)
    bare = replace(device, cache=0.0)
    uncached = sum(k.seconds(bare) for k in visited)
    return Step(sum(each[name] for name in FLOOR), sum(each.values()), sent, uncached)


def table(work: Workload, estimates: list[Estimate], name: str, l0: float) -> str:
    """Markdown: the kernels of one rank of the first strategy, then every strategy."""
    device, first = DEVICES[name], estimates[0]
    lines = [
        f"{work.form.free_slots:,} free slots, D={work.form.width}, {work.rows:,} rows, mean L0 {l0:g}, {name}; "
        f"kernels of a rank under {first.strategy}",
        "",
        "| kernel | MB | MB gathered | GFLOP | ms |",
        "|---|---|---|---|---|",
    ]
    for kernel in kernels(work, first.strategy, first.devices, l0):
        moved = f"{kernel.bytes / 1e6:,.0f} | {kernel.gathered / 1e6:,.0f} | {kernel.operations / 1e9:,.0f}"
        lines.append(f"| {kernel.name} | {moved} | {1e3 * kernel.seconds(device):.2f} |")
    lines += [
        "",
        "| strategy | devices | floor, ms | kernels, ms | sent, ms | step, ms | step / floor | without cache |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for found in estimates:
        one = step(work, found, device, l0)
        cells = " | ".join(f"{1e3 * seconds:.2f}" for seconds in (one.floor, one.kernels, one.sent, one.total))
        ratios = f"{one.total / one.floor:.2f} | {(one.uncached + one.sent) / one.floor:.2f}"
        lines.append(f"| {found.strategy} | {found.devices} | {cells} | {ratios} |")
    return "\n".join(lines)
