"""Which kernel a bank uses at a step: pinned by configuration, or chosen from the density at the last one.

And whether bf16 products are worth having on a machine.
"""

import importlib.util
import logging
import os
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer import private
from trainer.errors import UserError
from trainer.kernels.dense import dense_kernel
from trainer.kernels.interface import BankKernel

NAMES = ("auto", "dense", "sparse", "triton")
# Share of active entries below which a bank leaves the dense kernel, and above which it returns (docs/performance.md,
# "Switching point"). The gap keeps a bank near the switching point from changing at every step.
LEAVE_DENSE, RETURN_TO_DENSE = 0.05, 0.07


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
    ):
        device = device or torch.device("cpu")
        if name not in NAMES:
            raise UserError(f"kernel={name!r} is unknown; use one of {', '.join(NAMES)}")
        self.pinned = name != "auto"
        self._kernels: dict[str, BankKernel] = {"dense": dense_kernel}
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
        self._noted: Tensor | None = None

    def _add(self, name: str, device: torch.device) -> str | None:
        loaded = {"sparse": _sparse, "triton": _triton}[name](device)
        if isinstance(loaded, str):
            return loaded
        self._kernels[name] = loaded
        return None

    def note(self, counts: Tensor) -> None:
        """Take active entries and rows [2, banks] of the last step, over the global batch, to be used when needed."""
        self._noted = counts

    def names(self) -> list[str]:
        """Name of the kernel of each bank at the step that comes."""
        if self._noted is not None and not self.pinned:
            active, rows = self._noted.tolist()
            if all(rows):  # a batch whose rows are all masked says nothing
                self._decide([a / (r * n) for a, r, n in zip(active, rows, self._slots, strict=True)])
        self._noted = None
        return list(self._names)

    def _decide(self, densities: Sequence[float]) -> None:
        for bank, density in enumerate(densities):
            if density < LEAVE_DENSE:
                self._names[bank] = self._fast
            elif density > RETURN_TO_DENSE:
                self._names[bank] = "dense"

    def kernels(self) -> list[BankKernel]:
        """The kernel of each bank at the step that comes."""
        return [self._kernels[name] for name in self.names()]


def _sparse(device: torch.device) -> BankKernel | str:
    """The kernel, or why it cannot run."""
    if device.type != "cpu":
        return f"sparse is for CPU and the weights are on {device.type}"
    from trainer.kernels import native

    problem = native.load()
    if problem:
        return problem
    from trainer.kernels.sparse import sparse_kernel

    return sparse_kernel


def _triton(device: torch.device) -> BankKernel | str:
    """The kernel, or why it cannot run."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"triton is for CUDA and the weights are on {device.type}"
    from trainer.kernels.triton import triton_kernel

    return triton_kernel
