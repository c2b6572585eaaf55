"""What a kernel is given and what it owes.

A kernel computes a run of banks of free slots: `recon, sp, perp, pull = kernel(banks, recon, context)`, with those of
each bank (fp32 masters, see BankWeights), recon [B, D] fp32 (the running reconstruction). Most visit bank after bank
(`one_by_one`), in the form `kernel(weights, recon, context)`; for one bank z, a kernel returns
- recon + z W_dec [B, D], where z is the bank's code and W_dec its decoder rows as they are used, out of place (the
  banks form one autograd chain);
- sp, a scalar: the sum over rows and slots of ||W_dec_j|| z_bj, or with `weights.bandwidth` the active entries;
- perp, a scalar: the sum over this bank of squared correlations with the concept slots, over the global batch, each
  slot counted as often as `weights.counted()` says (0 without `context.perp`);
- pull, a scalar: the sum over rows and the slots `weights.dead` of ||W_dec_j|| max(threshold_j - pre_bj, 0);
and for several, the sums over them. All four are differentiable in the weights and in recon; x gets no gradient (the
language model is frozen). Gradients of perp flow to the concept code through `Orthogonality.grad_concept`, which a
kernel adds to in its forward pass.

The code is that of `apply_gate`: z_bj = pre_bj where pre_bj > threshold_j (0 without `weights.threshold`), else 0; what
is not a number passes, to be seen in the loss. An entry is active where the gate lets it pass, and gradients live on
active entries alone. Kernels take thresholds of any sign as that formula says; it is a gate's duty to give none below
0, where a code would be negative. A threshold is a constant; but with `weights.bandwidth` it is not below 0 and has the
pseudo-gradient of `apply_gate` and `steps`, for which entries count that are not active: those within half a bandwidth
below it.
"""

from collections.abc import Callable, Sequence
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

    fired [n] bool: slots active on some row. active, a scalar: active entries in all. squares [n] fp32: of each
    slot, the sum of its squared correlations with the concept slots, whatever it counts; None without `context.perp`.
    """

    fired: Tensor
    active: Tensor
    squares: Tensor | None = None


@dataclass
class StepContext:
    """What all banks of one step share, and where each leaves its statistics.

    x [B, D] fp32 normalised activations; x_bf16 the same in bf16, or None when products run in fp32. stats: of each
    bank, in order. room: entries that a kernel on a device makes room for, None: as many as there are, for which it
    waits. needed: scalars, what the calls of such kernels would have needed; one above `room` makes the step void.
    zero: a scalar 0 where x is.
    """

    x: Tensor
    x_bf16: Tensor | None
    perp: Orthogonality | None
    stats: list[BankStats] = field(default_factory=list)
    room: int | None = None
    needed: list[Tensor] = field(default_factory=list)
    zero: Tensor = field(default_factory=lambda: torch.zeros(()))
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

    def room_for(self, needed: Tensor) -> int:
        """Entries to make room for where `needed`, a scalar, are there."""
        if self.room is None:
            return max(int(needed), 1)
        self.needed.append(needed)
        return self.room

    def note_cramped(self, into: Tensor) -> None:
        """Write how many calls had too little room into a scalar that is 0."""
        if self.room is not None and len(self.needed) == 1:
            torch.gt(self.needed[0], self.room, out=into)
        elif self.room is not None and self.needed:
            into.copy_((torch.stack(self.needed) > self.room).sum())

    @cached_property
    def row_norms(self) -> Tensor:
        """The norm of each row of x, [B]."""
        return torch.linalg.vector_norm(self.x, dim=1)

    @cached_property
    def max_row_norm(self) -> float:
        """The largest norm of a row of x; bounds the rounding error of a product with it."""
        return float(self.row_norms.max()) if len(self.x) else 0.0


Result = tuple[Tensor, Tensor, Tensor, Tensor]
BankKernel = Callable[[BankWeights, Tensor, StepContext], Result]  # for one bank


class RunKernel(Protocol):
    """Signature of every kernel."""

    def __call__(self, banks: Sequence[BankWeights], recon: Tensor, context: StepContext) -> Result: ...


def one_by_one(kernel: BankKernel) -> RunKernel:
    """The kernel of a run of banks that calls `kernel` for each."""

    def run(banks: Sequence[BankWeights], recon: Tensor, context: StepContext) -> Result:
        sp = perp = pull = recon.new_zeros(())
        for bank in banks:
            recon, bank_sp, bank_perp, bank_pull = kernel(bank, recon, context)
            sp, perp, pull = sp + bank_sp, perp + bank_perp, pull + bank_pull
        return recon, sp, perp, pull

    return run


def end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """Vectors one after the other: a view where they lie so in memory, else a copy."""
    if not parts:
        return torch.empty(0)
    place, storage = parts[0].data_ptr(), parts[0].untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != place or part.untyped_storage().data_ptr() != storage or not part.is_contiguous():
            return torch.cat(list(parts))
        place += part.nbytes
    return parts[0].as_strided((sum(map(len, parts)),), (1,))


def column_scale(total: Tensor, square: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n] and inverse norm [n] of centred columns, from global sums of z and z^2.

    The inverse norm of a constant column is 0.
    """
    # In double: the difference of two large sums is what a correlation divides by.
    centred = square.double() - total.double().square() / rows
    return total / rows, inverse_norm(centred, square).float()
