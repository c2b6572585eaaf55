"""Gates: how a code comes from pre-activations. z = pre where pre > threshold, else 0; a threshold of 0 is ReLU.

A kind of gate is one subclass of Gate and one entry of GATES. Kernels know no kinds: they are given the thresholds of a bank.

Shapes: B rows, n slots of a bank.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Gate(ABC):
    """One kind of gate. It keeps no tensors itself: what it needs lies in the banks, with their weights."""

    @abstractmethod
    def shapes(self, slots: int) -> dict[str, tuple[int, ...]]:
        """Tensors that a bank of this many slots keeps for the gate beside its weights: name -> shape, fp32."""

    @abstractmethod
    def threshold(self, bank: nn.Module) -> Tensor | None:
        """Thresholds [n] fp32 of the slots of a bank; None: 0 for every slot."""


class ReLU(Gate):
    """Threshold 0 for every slot."""

    def shapes(self, slots: int) -> dict[str, tuple[int, ...]]:
        return {}

    def threshold(self, bank: nn.Module) -> None:
        return None


GATES: dict[str, Gate] = {"relu": ReLU()}


def apply_gate(pre: Tensor, threshold: Tensor | None) -> Tensor:
    """Code z [B, n] from pre-activations [B, n]. What is not a number passes, so that the loss shows it."""
    if threshold is None:
        return torch.relu(pre)
    return pre.masked_fill(pre <= threshold, 0.0)
