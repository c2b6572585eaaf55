"""The binding term as the fused objective computes it: a sum over the rows of a rank, from counts of the global batch.

Shapes: B rows of this rank, R concepts, M labels of a row at most. The oracles are losses.binding, losses.independent
and losses.squares.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.labels import UNKNOWN, membership
from trainer.losses import LossForm


def summed_binding(
    logits: Tensor, concept: Tensor, form: LossForm, labelled: Tensor, positives: Tensor | None
) -> Tensor:
    """Sum over the rows that the term counts, a scalar.

    Args:
        logits: [B, R], of all rows or of none of them.
        concept: [B, M].
        labelled: rows of the global batch that the term counts, a scalar.
        positives: [R], those of them that list each concept; None where rows with and without it are not balanced.
    """
    if logits.shape[1] == 0:
        return logits.new_zeros(())
    if form.binding == "softmax":
        return _exclusive(logits, concept)
    counted = form.counted(concept)[:, None]
    if form.binding == "squares":
        target = membership(concept, logits.shape[1]).to(logits.dtype)
        return torch.where(counted, logits - target, 0.0).square().sum() / logits.shape[1]
    absent = torch.where(counted, F.softplus(logits), 0.0)  # as if no row listed a concept
    place = concept.clamp_min(0)
    own = logits.gather(1, place)  # [B, M], of what rows list; anything elsewhere
    if positives is None:
        present = -own  # softplus(-x) - softplus(x)
    else:
        with_it, without_it = labelled / (2 * positives), labelled / (2 * (labelled - positives))
        # No row has these weights where they are infinite.
        with_it, without_it = (weight.nan_to_num(posinf=0.0) for weight in (with_it, without_it))
        absent = absent * without_it
        present = with_it[place] * F.softplus(-own) - without_it[place] * F.softplus(own)
    return absent.sum() + torch.where(concept >= 0, present, 0.0).sum()


def _exclusive(logits: Tensor, concept: Tensor) -> Tensor:
    """Cross-entropy of logits [B, R] with the concepts [B, M] that a row lists, each as likely as the others."""
    if concept.shape[1] == 1:
        target = concept[:, 0].clamp_min(UNKNOWN)
        return F.cross_entropy(logits, target, ignore_index=UNKNOWN, reduction="sum")
    member = membership(concept, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(logits, member / member.sum(dim=1, keepdim=True).clamp_min(1), reduction="sum")


def summed_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits [B, A] with target [B], -1 = none, summed over rows; 0 where A is 0."""
    if logits.shape[1] == 0:
        return logits.new_zeros(())
    return F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
