"""Gates: how a code comes from pre-activations. z = pre where pre > threshold, else 0; a threshold of 0 is ReLU.

A kind of gate is one subclass of Gate and one entry of GATES. Kernels know no kinds: they are given the thresholds of a
bank, which are never below 0.

Shapes: B rows, D model width, n slots of a bank.
"""

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Gate:
    """One kind of gate. It keeps no tensors itself: what it needs lies in the banks, with their weights."""

    fixes_l0 = False  # whether the gate itself keeps the number of active slots, so that no sparsity term has to
    jumps = False  # whether its thresholds are trained, and the sparsity term counts active slots

    def parameters(self, slots: int, width: int) -> Tensors:
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

    def follow(self, buffers: Tensors, l0: Tensor, target: float | Tensor) -> None:
        """Look at the mean number of active free slots of a row at the step that was made, a scalar, where `target` are
        wanted. buffers: those of all banks, end to end, to be changed in place."""

    def renew(self, tensors: Tensors, slots: Tensor, living: Tensor) -> Tensor:
        """Thresholds [m] with which slots [m] of a bank begin anew, noted in its tensors; living [n] bool: the slots
        that are not dead."""
        return torch.zeros(len(slots))


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
        return {"theta": torch.full((1,), first_threshold(width))}

    def threshold(self, bank: nn.Module) -> Tensor:
        return bank.get_buffer("theta").expand(bank.get_buffer("last_fired").numel())

    def tensors_at(self, threshold: Tensor | None) -> Tensors:
        return {"theta": torch.zeros(1) if threshold is None else threshold[:1]}

    def renew(self, tensors: Tensors, slots: Tensor, living: Tensor) -> Tensor:
        return tensors["theta"].expand(len(slots))

    @torch.no_grad()
    def follow(self, buffers: Tensors, l0: Tensor, target: float | Tensor) -> None:
        change = (l0 / target - 1.0).clamp(-1.0, 1.0)
        buffers["theta"].mul_((self.RATE * change).exp().float())


class JumpReLU(Gate):
    """A threshold per slot, trained with the others by a pseudo-gradient ("Jumping Ahead", arXiv 2407.14435): see
    `apply_gate` and `steps`.

    A threshold is 2^(RATE p) of its parameter p. An update of AdamW moves p by about the learning rate: with RATE 1 a
    run of a thousand steps could not bring a threshold to where it is wanted, and a weight of sparsity that follows
    the count of active slots (dictionary.target_l0) would overshoot.
    """

    jumps = True
    RATE = 64.0
    # A threshold of 0 has no logarithm; no pre-activation above 0 that matters lies below this one.
    LEAST = 1e-30

    def parameters(self, slots: int, width: int) -> Tensors:
        return self.tensors_at(torch.full((slots,), first_threshold(width)))

    def threshold(self, bank: nn.Module) -> Tensor:
        return (self.RATE * bank.get_parameter("level")).exp2()

    def tensors_at(self, threshold: Tensor | None) -> Tensors:
        return {} if threshold is None else {"level": threshold.clamp_min(self.LEAST).log2() / self.RATE}

    def renew(self, tensors: Tensors, slots: Tensor, living: Tensor) -> Tensor:
        level = tensors["level"]
        if bool(living.any()):
            level[slots] = level[living].mean()
        return (self.RATE * level[slots]).exp2()


GATES: dict[str, Gate] = {"relu": ReLU(), "batch_topk": BatchTopK(), "jumprelu": JumpReLU()}


def first_threshold(width: int) -> float:
    """A threshold to begin with: above 0, since what is multiplied never leaves it; small beside pre-activations, which
    begin with deviation 1 / sqrt(D)."""
    return 0.1 * width**-0.5


def apply_gate(pre: Tensor, threshold: Tensor | None, bandwidth: float = 0.0) -> Tensor:
    """Code z [B, n] from pre-activations [B, n]. What is not a number passes, so that the loss shows it.

    With a bandwidth the threshold has the pseudo-gradient dz/dthreshold = -threshold/bandwidth within half a bandwidth
    of it, 0 elsewhere; without, it is a constant.
    """
    if threshold is None:
        return torch.relu(pre)
    z = pre.masked_fill(pre <= threshold, 0.0)
    return z + threshold.detach() * _jump(pre, threshold, bandwidth) if bandwidth else z


def steps(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where the gate lets pre-activations [B, n] pass, else 0; its pseudo-gradient is -1/bandwidth within half a
    bandwidth of the threshold [n]."""
    return (pre > threshold).to(pre.dtype) + _jump(pre, threshold, bandwidth)


def _jump(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """0 [B, n], with the gradient of the rectangle kernel with respect to the threshold."""
    near = (pre - threshold).abs() < bandwidth / 2
    return near * (threshold.detach() - threshold) / bandwidth
