"""What a bank kernel is given and what it owes.

A kernel computes one bank of free slots: `recon, sp, perp = kernel(weights, recon, context)`, with the bank's weights
(fp32 masters, see BankWeights), recon [B, D] fp32 (the running reconstruction), and returns
- recon + z W_dec [B, D], where z is the bank's code and W_dec its decoder rows as they are used, out of place (the
  banks form one autograd chain);
- sp, a scalar: the sum over rows and slots of ||W_dec_j|| z_bj;
- perp, a scalar: the sum over this bank of squared correlations with the concept slots, over the global batch, each
  slot counted as often as `weights.counted()` says (0 without `context.perp`).
All three are differentiable in the weights and in recon; x gets no gradient (the language model is frozen). Gradients
of perp flow to the concept code through `Orthogonality.grad_concept`, which a kernel adds to in its forward pass.

The code is that of `apply_gate`: z_bj = pre_bj where pre_bj > threshold_j (0 without `weights.threshold`), else 0; what
is not a number passes, to be seen in the loss. An entry is active where the gate lets it pass, and gradients live on
active entries alone. Kernels take thresholds of any sign as that formula says; it is a gate's duty to give none below
0, where a code would be negative. A threshold is a constant here: it gets no gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.kernels.pairs import RowPairs
from trainer.losses import inverse_norm


@dataclass
class Orthogonality:
    """What the orthogonality term of one step needs beside the bank.

    concept [B, R]: centred concept code of the local rows divided by its global norm (0 for a constant slot).
    inv_norm [R]: one over that norm (0 for a constant slot).
    rows: global number of rows G, a scalar tensor.
    reduce: sums a tensor over data ranks, in place, and returns it.
    grad_concept [B, R]: d perp / d z_concept of the local rows, summed over the banks seen so far.
    pairs: another way to compute the term, where the local rows are the global batch; what banks add there
        `concept_gradient` takes up.
    """

    concept: Tensor
    inv_norm: Tensor
    rows: Tensor
    reduce: Callable[[Tensor], Tensor]
    grad_concept: Tensor
    pairs: RowPairs | None = None

    @classmethod
    def standardise(cls, z: Tensor, rows: Tensor, reduce: Callable[[Tensor], Tensor]) -> "Orthogonality":
        """For the concept code z [B, R] of the local rows."""
        centred = z - reduce(z.sum(dim=0)) / rows
        squares = reduce(torch.stack([centred.square().sum(dim=0), z.square().sum(dim=0)]))
        inv_norm = inverse_norm(squares[0], squares[1])
        return cls(centred * inv_norm, inv_norm, rows, reduce, torch.zeros_like(z))

    def concept_gradient(self) -> Tensor:
        """d perp / d z_concept [B, R] of the local rows, over all banks; asked for once, after the last of them."""
        rest = None if self.pairs is None else self.pairs.concept_gradient()
        if rest is not None:
            self.grad_concept.add_(rest * self.inv_norm, alpha=2.0)
        return self.grad_concept


@dataclass
class BankStats:
    """What a kernel reports about its bank, without gradient.

    fired [n] bool: slots active on some row. active, a scalar fp32: active entries in all. squares [n] fp32: of each
    slot, the sum of its squared correlations with the concept slots, whatever it counts; None without `context.perp`.
    """

    fired: Tensor
    active: Tensor
    squares: Tensor | None = None


@dataclass
class StepContext:
    """What all banks of one step share, and where each leaves its statistics.

    x [B, D] fp32 normalised activations; x_bf16 the same in bf16, or None when products run in fp32.
    """

    x: Tensor
    x_bf16: Tensor | None
    perp: Orthogonality | None
    stats: list[BankStats] = field(default_factory=list)
    _kept: dict[Callable[["StepContext"], Tensor], Tensor] = field(default_factory=dict)

    @property
    def operand(self) -> Tensor:
        """x [B, D] in the dtype of the products."""
        return self.x if self.x_bf16 is None else self.x_bf16

    def once(self, compute: Callable[["StepContext"], Tensor]) -> Tensor:
        """`compute(context)`, a function of the rows alone: called at a kernel's first bank, found again at others."""
        if compute not in self._kept:
            self._kept[compute] = compute(self)
        return self._kept[compute]

    @cached_property
    def max_row_norm(self) -> float:
        """The largest norm of a row of x; bounds the rounding error of a product with it."""
        return float(self.x.norm(dim=1).max()) if len(self.x) else 0.0


class BankKernel(Protocol):
    """Signature of every kernel."""

    def __call__(self, weights: BankWeights, recon: Tensor, context: StepContext) -> tuple[Tensor, Tensor, Tensor]: ...


def column_scale(total: Tensor, square: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n] and inverse norm [n] of centred columns, from global sums of z and z^2.

    The inverse norm of a constant column is 0.
    """
    # In double: the difference of two large sums is what a correlation divides by.
    centred = square.double() - total.double().square() / rows
    return total / rows, inverse_norm(centred, square).float()
