"""Gates: how a code comes from pre-activations. z = pre where pre > threshold, else 0; a threshold of 0 is ReLU.

A kind of gate is one subclass of Gate and one entry of GATES. Kernels know no kinds: they are given the thresholds of a
bank, which are never below 0.

Shapes: B rows, D model width, n slots of a bank.
"""

import math

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Gate:
    """One kind of gate. It keeps no tensors itself: what it needs lies in the banks, with their weights."""

    fixes_l0 = False  # whether the gate itself keeps the number of active slots, so that no sparsity term has to

    def parameters(self, slots: int) -> Tensors:
        """What a bank of this many slots trains for the gate beside its weights: name -> initial value, fp32."""
        return {}

    def buffers(self, slots: int, width: int) -> Tensors:
        """What a bank keeps for the gate without training it: name -> initial value, fp32."""
        return {}

    def threshold(self, bank: nn.Module) -> Tensor | None:
        """Thresholds [n] fp32 of the slots of a bank; None: 0 for every slot."""
        return None

    def tensors_at(self, threshold: Tensor | None) -> Tensors:
        """The values of its parameters and buffers at which a bank has these thresholds [n] (None: 0)."""
        return {}

    def follow(self, bank: nn.Module, l0: float, target: float) -> None:
        """Look at the mean number of active free slots of a row at the step that was made, where `target` are
        wanted."""


class ReLU(Gate):
    """Threshold 0 for every slot."""


class BatchTopK(Gate):
    """One threshold for all free slots, above which lie about k entries a row of the global batch ("BatchTopK Sparse
    Autoencoders", arXiv 2412.06410).

    The exact threshold of a batch needs the codes of all banks at once. Here it follows instead: after a step it is
    multiplied by exp(RATE (l0 / k - 1)), the exponent held within RATE. Every bank keeps a copy of the one number, and
    l0 is that of the global batch, so the copies stay equal on any number of ranks. At inference the threshold is the
    last one.
    """

    fixes_l0 = True
    RATE = 0.2

    def buffers(self, slots: int, width: int) -> Tensors:
        # Above 0, since a product never leaves it; small beside pre-activations, which begin with deviation 1 /
        # sqrt(D).
        return {"theta": torch.full((1,), 0.1 * width**-0.5)}

    def threshold(self, bank: nn.Module) -> Tensor:
        return bank.get_buffer("theta").expand(bank.get_buffer("last_fired").numel())

    def tensors_at(self, threshold: Tensor | None) -> Tensors:
        return {"theta": torch.zeros(1) if threshold is None else threshold[:1]}

    @torch.no_grad()
    def follow(self, bank: nn.Module, l0: float, target: float) -> None:
        change = min(max(l0 / target - 1.0, -1.0), 1.0)
        bank.get_buffer("theta").mul_(math.exp(self.RATE * change))


class JumpReLU(Gate):
    """A threshold per slot, the exponential of a parameter."""

    # A threshold of 0 has no logarithm; no pre-activation above 0 that matters lies below this one.
    LEAST = 1e-30

    def parameters(self, slots: int) -> Tensors:
        return {"log_threshold": torch.full((slots,), math.log(1e-3))}

    def threshold(self, bank: nn.Module) -> Tensor:
        return bank.get_parameter("log_threshold").exp()

    def tensors_at(self, threshold: Tensor | None) -> Tensors:
        return {} if threshold is None else {"log_threshold": threshold.clamp_min(self.LEAST).log()}


GATES: dict[str, Gate] = {"relu": ReLU(), "batch_topk": BatchTopK(), "jumprelu": JumpReLU()}


def apply_gate(pre: Tensor, threshold: Tensor | None) -> Tensor:
    """Code z [B, n] from pre-activations [B, n]. What is not a number passes, so that the loss shows it."""
    if threshold is None:
        return torch.relu(pre)
    return pre.masked_fill(pre <= threshold, 0.0)
