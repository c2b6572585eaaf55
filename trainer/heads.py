"""What stands on the concept slots: their code and its share of the loss, the answers, and orthogonality to free slots.

Each is plain PyTorch, or on a device the few launches of trainer/kernels/triton/heads.py (`fast`, None elsewhere), for
which what is plain here is the oracle.

Shapes: B rows of this rank, D width, R concepts, M labels of a row at most, A answers, K free slots held here.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from trainer.binding import summed_binding, summed_cross_entropy
from trainer.dictionary import BankWeights, Joined, SlotBank, apply_gate
from trainer.following import followed_dependence, perp_weight
from trainer.kernels import BankStats, Orthogonality
from trainer.kernels.interface import end_to_end
from trainer.losses import LossForm

Slots = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def concept_slots(
    weights: BankWeights,
    x: Tensor,
    concept: Tensor,
    form: LossForm,
    labelled: Tensor,
    positives: Tensor | None,
    fast: ModuleType | None,
) -> Slots:
    """What concept slots make of rows.

    Args:
        weights: of the concept slots.
        x: [B, D] in the dtype of the products.
        concept: [B, M], see trainer.labels.
        form, labelled, positives: see summed_binding.

    Returns:
        code [B, R] and its share of the reconstruction [B, D]; sums over rows of ||W_dec_r|| z_r and of the binding
        term, scalars; and [2] without gradient: active entries, and rows whose largest logit is one of their concepts'.
    """
    rows = len(x) and len(weights.b_enc)
    if fast is not None and rows and concept.shape[1] == 1 and form.binding == "softmax" and form.bind_on == "pre":
        return fast.concept_slots(weights, x, concept)
    pre = weights.pre_activations(x)
    z = apply_gate(pre, weights.threshold)
    logits = pre if form.bind_on == "pre" else z
    bind = summed_binding(logits, concept, form, labelled, positives)
    return z, weights.decode(z.to(x.dtype)), (z @ weights.decoder().norm(dim=1)).sum(), bind, _bound(z, logits, concept)


@torch.no_grad()
def _bound(z: Tensor, logits: Tensor, concept: Tensor) -> Tensor:
    if not z.numel():
        return z.new_zeros(2)
    right = logits.argmax(dim=1, keepdim=True) == concept
    return torch.stack([(z > 0).sum(dtype=torch.float64), right.sum(dtype=torch.float64)])


def value(head: nn.Module | None, z: Tensor, answer: Tensor, bf16: bool, fast: ModuleType | None) -> Tensor:
    """Sum over rows of the cross-entropy of the head's logits [B, A] on a code [B, R] with answer [B], -1 = none."""
    if head is None:
        return z.new_zeros(())
    with torch.autocast(z.device.type, torch.bfloat16, enabled=bf16):
        logits = head(z).float()
    if fast is not None and logits.numel():
        return fast.cross_entropy(logits, answer)
    return summed_cross_entropy(logits, answer)


def orthogonality(
    z: Tensor, rows: Tensor, reduce: Callable[[Tensor], Tensor], fast: ModuleType | None
) -> Orthogonality:
    """What banks need of the concept code z [B, R]; see Orthogonality. rows: of the global batch, a scalar."""
    if fast is not None and z.numel():
        return fast.standardise(z, rows, reduce)
    return Orthogonality.standardise(z, rows.clamp_min(1), reduce)


class Dependence:
    """How much free slots depend on the concepts, which follows the batches (following.followed_dependence)."""

    def __init__(self, banks: Sequence[SlotBank], fast: ModuleType | None):
        self._kept, self._fast = Joined(banks, "dependence"), fast
        self._counted: Tensor | None = None  # always in one place, so that tables of addresses stay right
        # Of the forward passes since the last update: squares [K], rows and inverse norms of concept slots.
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def counted(self) -> list[Tensor]:
        """How much the slots of each bank count in the orthogonality term, [n] from 0 to 1."""
        whole = self._kept.whole()
        if self._fast is None:
            return self._kept.split(perp_weight(whole))
        if self._counted is None or self._counted.device != whole.device:
            self._counted = torch.empty_like(whole)
        return self._kept.split(self._fast.counted(whole, self._counted))

    def note(self, stats: Sequence[BankStats], perp: Orthogonality) -> None:
        """Take what a forward pass found."""
        squares = [of_bank.squares for of_bank in stats if of_bank.squares is not None]
        self._seen.append((end_to_end(squares), perp.rows, perp.inv_norm))

    def follow(self, made: Tensor) -> None:
        """Go on from what was noted since the last call, if the update was made, a scalar bool."""
        for squares, rows, inv_norm in self._seen:
            whole = self._kept.whole()
            if self._fast is None:
                concepts = (inv_norm > 0).sum()
                whole.copy_(followed_dependence(whole, squares, rows, concepts, made))
            else:
                self._fast.follow(whole, squares, rows, inv_norm, made)
        self._seen.clear()
