"""The term `pull` of one bank: the distance of its dead slots to their thresholds (losses.pull), without a product.

sum over rows of max(threshold_j - pre_bj, 0) is sum_b (threshold_j - pre_bj) less the part of the rows on which the
slot is active after all, and the first needs the sum of the rows alone.

Shapes: B rows, D width, n slots of the bank, m dead slots, E active entries of these.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.kernels.interface import StepContext


@dataclass
class Pull:
    """What the gradients of the term are made of."""

    slots: Tensor  # [m] int64
    idle: Tensor  # [m] fp32, rows on which each is idle
    rows: Tensor  # [m, D], their sum
    distance: Tensor  # [m], of each slot the sum over rows
    norm: Tensor  # [m], of decoder rows as they are used
    along: Tensor | None  # [m, D], their directions; None where they are used at norm 1

    @classmethod
    def of(cls, weights: BankWeights, context: StepContext, slot: Tensor, row: Tensor) -> "Pull | None":
        """For the active entries of a bank (those of other slots have no part), slot [any] and row [any] int64; None
        where no slot is dead."""
        if weights.dead is None or weights.threshold is None or not bool(weights.dead.any()):
            return None
        slots = weights.dead.nonzero()[:, 0]
        place = torch.full_like(weights.dead, -1, dtype=torch.int64)
        place[slots] = torch.arange(len(slots), device=slots.device)
        place, inside = place[slot], place[slot] >= 0
        place, row = place[inside], row[inside]
        rows = context.once(_row_sum).expand(len(slots), -1).index_add(0, place, context.x[row], alpha=-1.0)
        idle = rows.new_full((len(slots),), len(context.x)) - torch.bincount(place, minlength=len(slots))
        W_enc, W_dec = weights.W_enc.detach()[slots], weights.W_dec.detach()[slots]
        lacking = weights.threshold.detach()[slots] - weights.b_enc.detach()[slots]
        distance = idle * lacking - (rows * W_enc).sum(dim=1)
        if weights.decoder_norm == "unit":
            return cls(slots, idle, rows, distance, torch.ones_like(idle), None)
        norm = W_dec.norm(dim=1)
        return cls(slots, idle, rows, distance, norm, W_dec / norm.clamp_min(1e-12)[:, None])

    def value(self) -> Tensor:
        """Sum over rows and slots."""
        return (self.distance * self.norm).sum()

    def add_gradients(self, g: Tensor, grads: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[float, float]:
        """Add its gradients, times g, to those of W_enc, b_enc, W_dec and the thresholds of the bank, in place.

        Returns by how much the sums of squares of the first and the third change.
        """
        grad_enc, grad_b, grad_dec, grad_threshold = grads
        before = self._squares(grad_enc), self._squares(grad_dec)
        grad_enc.index_add_(0, self.slots, self.rows * (-g * self.norm)[:, None])
        grad_b.index_add_(0, self.slots, -g * self.norm * self.idle)
        grad_threshold.index_add_(0, self.slots, g * self.norm * self.idle)
        if self.along is not None:
            grad_dec.index_add_(0, self.slots, self.along * (g * self.distance)[:, None])
        return self._squares(grad_enc) - before[0], self._squares(grad_dec) - before[1]

    def _squares(self, gradient: Tensor) -> float:
        return float(gradient[self.slots].double().square().sum())


def _row_sum(context: StepContext) -> Tensor:
    return context.x.sum(dim=0)
