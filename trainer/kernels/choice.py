"""Which kernel a bank uses at a step: pinned by configuration, or chosen from the density at the last one.

And whether bf16 products are worth having on a machine.
"""

import importlib.util
import logging
import os
import platform
from collections import deque
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from trainer import private
from trainer.errors import UserError
from trainer.kernels.dense import dense_kernel
from trainer.kernels.interface import RunKernel, one_by_one
from trainer.late import Late

NAMES = ("auto", "dense", "sparse", "triton")
# Share of active entries below which a bank leaves the dense kernel, and above which it returns (docs/performance.md,
# "Switching point"). The gap keeps a bank near the switching point from changing at every step.
LEAVE_DENSE, RETURN_TO_DENSE = 0.05, 0.07
TOGETHER = ("triton",)  # kernels that visit several banks in one call
# Entries that a kernel on a device makes room for: as a share of all at first, then so many times what was needed.
FIRST_ROOM, SPARE_ROOM, LEAST_ROOM = 1 / 16, 4, 1 << 12
MOST_CORRELATIONS = 1 << 26  # numbers of the [slots, R + 2] block of one call: 256 MiB


def usable_precision(precision: str, device: torch.device) -> str:
    """`precision`, fp32 or bf16; but fp32 on a CPU without instructions for bf16.

    There bf16 products are emulated, and many times slower.
    """
    if precision != "bf16" or device.type != "cpu" or _multiplies_bf16():
        return precision
    return "fp32"


def _multiplies_bf16() -> bool:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return private.has_avx512_bf16()
    return private.has_mkldnn_bf16()


class KernelChoice:
    """Names a kernel for each bank. The counts that it is shown are global, so every rank chooses alike.

    Args:
        name: auto, or a kernel for all banks at all times.
        slots: of each bank held here.
        device: where the weights live; `sparse` runs on CPU, `triton` on CUDA.
        lag: steps after which counts are read (Topology.lag).
        going_on: names to go on with, where `name` is auto; from a machine with another fast kernel, that of this one
            is taken.

    Raises UserError for an unknown name, or one that this machine cannot run.
    """

    def __init__(
        self,
        name: str,
        slots: Sequence[int],
        device: torch.device | None = None,
        going_on: Sequence[str] | None = None,
        lag: int = 0,
    ):
        device = device or torch.device("cpu")
        if name not in NAMES:
            raise UserError(f"kernel={name!r} is unknown; use one of {', '.join(NAMES)}")
        self.pinned = name != "auto"
        self._kernels: dict[str, RunKernel] = {"dense": one_by_one(dense_kernel)}
        self._fast = name if self.pinned else ("sparse" if device.type == "cpu" else "triton")
        if self._fast != "dense":
            problem = self._add(self._fast, device)
            if problem and self.pinned:
                raise UserError(f"kernel={name} cannot run here: {problem}")
            if problem:
                logging.getLogger(__name__).warning("every bank stays on the dense kernel: %s", problem)
                self.pinned, self._fast = True, "dense"
        self._slots = list(slots)
        self._names = [self._fast if self.pinned else "dense"] * len(self._slots)
        if going_on is not None and not self.pinned:
            self._names = ["dense" if kernel == "dense" else self._fast for kernel in going_on]
        self._late = Late(lag)
        self._rows: deque[int | None] = deque()  # of the counts that are still to be read
        self.needed: float | None = None  # entries that a call needed room for, as far as is known

    @property
    def heads(self) -> ModuleType | None:
        """What computes the heads of the concept slots in few launches (triton/heads.py); None where that cannot be."""
        if self._fast != "triton":
            return None
        from trainer.kernels.triton import heads

        return heads

    @property
    def follows(self) -> bool:
        """Whether the counts of a step decide about later ones."""
        return bool(self._slots) and (not self.pinned or self._fast in TOGETHER)

    def _add(self, name: str, device: torch.device) -> str | None:
        loaded = {"sparse": _sparse, "triton": _triton}[name](device)
        if isinstance(loaded, str):
            return loaded
        self._kernels[name] = loaded
        return None

    def note(self, counts: Tensor, rows: int | None = None) -> None:
        """Take what a step found, over all data ranks, to be used when it is read.

        counts: entries that each call of a kernel on a device would have needed room for (none without such kernels),
            active entries by bank, and rows where `rows` does not say how many.
        """
        self._late.put(counts)
        self._rows.append(rows)

    def names(self) -> list[str]:
        """Name of the kernel of each bank at the step that comes."""
        self._read()
        return list(self._names)

    def catch_up(self) -> None:
        """Read the counts of every step so far, whatever it costs."""
        self._read(all_of_them=True)

    def _read(self, *, all_of_them: bool = False) -> None:
        for counts in self._late.due(all_of_them=all_of_them):
            known = self._rows.popleft()
            rows = counts.pop() if known is None else known
            needed, active = counts[: -len(self._slots)], counts[-len(self._slots) :]
            self.needed = max(needed, default=None)
            if rows:  # a batch whose rows are all masked says nothing
                self._decide([a / (rows * n) for a, n in zip(active, self._slots, strict=True)])
                if self.needed is None and not self.pinned:
                    self.needed = sum(active)

    def _decide(self, densities: Sequence[float]) -> None:
        for bank, density in enumerate([] if self.pinned else densities):
            if density < LEAVE_DENSE:
                self._names[bank] = self._fast
            elif density > RETURN_TO_DENSE:
                self._names[bank] = "dense"

    def runs(self, concepts: int, whole: bool) -> list[tuple[RunKernel, list[int]]]:
        """Kernels for the step that comes, and the banks that each is called with.

        concepts: R. whole: whether the weights of several banks can be had at a time.
        """
        runs: list[tuple[str, list[int]]] = []
        most = MOST_CORRELATIONS // (concepts + 2)
        open_runs: dict[str, list[int]] = {}
        for bank, name in enumerate(self.names()):
            run = open_runs.get(name)
            if run is None or sum(self._slots[i] for i in run) + self._slots[bank] > most:
                run = []
                runs.append((name, run))
            run.append(bank)
            if whole and name in TOGETHER:
                open_runs[name] = run
        return [(self._kernels[name], run) for name, run in runs]

    def room(self, rows: int) -> int:
        """Entries that a call for this many rows makes room for; a power of two, so that it seldom changes."""
        first = rows * sum(self._slots) * FIRST_ROOM
        wanted = first if self.needed is None else SPARE_ROOM * self.needed
        return 1 << max(int(wanted), LEAST_ROOM).bit_length()


def _sparse(device: torch.device) -> RunKernel | str:
    """The kernel, or why it cannot run."""
    if device.type != "cpu":
        return f"sparse is for CPU and the weights are on {device.type}"
    from trainer.kernels import native

    problem = native.load()
    if problem:
        return problem
    from trainer.kernels.sparse import sparse_kernel

    return one_by_one(sparse_kernel)


def _triton(device: torch.device) -> RunKernel | str:
    """The kernel, or why it cannot run."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"triton is for CUDA and the weights are on {device.type}"
    from trainer.kernels.triton import triton_kernel

    return triton_kernel
