"""Ways to compute one bank of free slots, and the rule that chooses between them."""

from trainer.kernels.choice import KernelChoice, usable_precision
from trainer.kernels.entries import active_entries
from trainer.kernels.interface import BankStats, Orthogonality, RunKernel, StepContext
from trainer.kernels.pairs import RowPairs

__all__ = [
    "BankStats",
    "KernelChoice",
    "Orthogonality",
    "RowPairs",
    "RunKernel",
    "StepContext",
    "active_entries",
    "usable_precision",
]
