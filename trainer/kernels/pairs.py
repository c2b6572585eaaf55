"""The correlation term as sums over pairs of rows: [G, G] blocks, not an [R, n] block per bank; for many concepts.

With a = Orthogonality.concept [G, R], K = a a^T and H = sum_j z_j z_j^T / n_j^2 over the free slots, ||C||_F^2 is
<K, H>: a bank adds to H only where two rows share a slot. Slot j needs (K z_j)_b at its active rows; the concept code
needs 2/nu_i ( (H' a)_bi - a_bi q_i ) with H' = H centred over rows and columns and q_i = (a^T H' a)_ii, once per step.
All rows of the global batch must be here, so this is for one data rank.
"""

from functools import cached_property

import torch
from torch import Tensor

# Cost of a pair of active rows of a slot, and of an entry of the two dense products [G, R] x [G, G], where an active
# entry times a concept costs 1 without pairs. Measured (docs/performance.md, "Correlation").
PAIR, DENSE = 2.0, {torch.bfloat16: 0.015, torch.float32: 0.055}


class RowPairs:
    """K and H of one step.

    Args:
        concept: a [B, R], see Orthogonality.
        rows: G, a scalar tensor. Micro-batches have fewer rows, and their a is not centred, which all of this rests on.
        slots: free slots of all banks that this rank visits.
        dtype: of the two dense products.
    """

    def __init__(self, concept: Tensor, rows: Tensor, slots: int, dtype: torch.dtype):
        self._concept, self._dtype = concept, dtype
        self._rows = rows
        self._slots = slots
        self._shared: Tensor | None = None  # H, once a bank adds to it

    @cached_property
    def _a(self) -> Tensor:
        return self._concept.to(self._dtype)

    def cheaper(self, per_slot: Tensor) -> bool:
        """Whether a bank with these numbers of active rows [n] needs less memory and time this way.

        Its share of the dense products counts.
        """
        rows, concepts = self._concept.shape
        if rows * rows > per_slot.numel() * concepts or rows != int(self._rows):
            return False
        entries, pairs = int(per_slot.sum()), int(per_slot.square().sum())
        dense = rows * rows * concepts * per_slot.numel() / self._slots
        return PAIR * pairs + DENSE[self._dtype] * dense < entries * concepts

    @cached_property
    def gram(self) -> Tensor:
        """K [G, G] fp32."""
        return (self._a @ self._a.T).float()

    @property
    def shared(self) -> Tensor:
        """H [G, G] fp32, which banks add to."""
        if self._shared is None:
            self._shared = torch.zeros_like(self.gram)
        return self._shared

    def concept_gradient(self) -> Tensor | None:
        """(H' a)_bi - a_bi q_i [G, R], to be multiplied by 2/nu_i; None when no bank added to H."""
        if self._shared is None:
            return None
        centred = self._shared - self._shared.mean(dim=0)
        centred -= centred.mean(dim=1, keepdim=True)
        product = (centred.to(self._a.dtype) @ self._a).float()
        return product.addcmul_(self._a.float(), (self._a * product).sum(dim=0), value=-1.0)
