"""Numbers between host and device without waiting for the device.

What a step computes is read when a later one is on its way; what the host decides, and rows, are sent from page-locked
memory. On a CPU all of it is immediate.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of these numbers on the device, without a wait."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=dtype)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Sender:
    """Sends rows to a device on a stream of its own, so that they travel while the device computes earlier steps."""

    def __init__(self, device: torch.device):
        self._device, self._module = device, torch.get_device_module(device)
        self._stream = self._module.Stream()

    def send(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on the device; what is computed from now on waits for them, the host does not where they lie in
        page-locked memory."""
        with self._module.stream(self._stream):
            sent = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        now = self._module.current_stream()
        now.wait_stream(self._stream)
        for tensor in sent:
            if tensor.device.type != "cpu":
                tensor.record_stream(now)  # its memory is not given out again before those computations are over
        return sent


class Mark:
    """The end of what a device was told to do so far; on a CPU that is always done."""

    def __init__(self, device: torch.device):
        self._reached = None
        if device.type != "cpu":
            self._reached = torch.get_device_module(device).Event()
            self._reached.record()

    def wait(self) -> None:
        """Until the device is there."""
        if self._reached is not None:
            self._reached.synchronize()


class Reading:
    """A vector on its way to the host."""

    def __init__(self, vector: Tensor):
        self._host = vector.detach()
        if vector.device.type != "cpu":
            self._host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._host.copy_(vector.detach(), non_blocking=True)
        self._there = Mark(vector.device)

    def take(self) -> list[float]:
        """The numbers; waits until they are there."""
        self._there.wait()
        return self._host.tolist()


class Late:
    """Vectors of consecutive steps, each read when `lag` further ones are there."""

    def __init__(self, lag: int):
        self.lag = lag
        self._waiting: deque[Reading] = deque()

    def put(self, vector: Tensor) -> None:
        """The vector of the next step."""
        self._waiting.append(Reading(vector))

    def due(self, *, all_of_them: bool = False) -> list[list[float]]:
        """The vectors whose time has come, oldest first; each is handed out once. `all_of_them`: whatever it costs."""
        return [self._waiting.popleft().take() for _ in range(len(self._waiting) - (0 if all_of_them else self.lag))]
