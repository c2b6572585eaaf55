"""The binding term as the fused objective computes it: sums over the rows of a rank.

Shapes: B rows of this rank, R concepts, M labels of a row at most. The oracle is losses.binding.
"""

import torch.nn.functional as F
from torch import Tensor

from trainer.labels import UNKNOWN, membership


def softmax_binding(logits: Tensor, concept: Tensor) -> Tensor:
    """Sum over rows that list a concept of the cross-entropy of logits [B, R] with the concepts [B, M] that they list,
    each as likely as the others."""
    if logits.shape[1] == 0:
        return logits.new_zeros(())
    if concept.shape[1] == 1:
        target = concept[:, 0].clamp_min(UNKNOWN)
        return F.cross_entropy(logits, target, ignore_index=UNKNOWN, reduction="sum")
    member = membership(concept, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(logits, member / member.sum(dim=1, keepdim=True).clamp_min(1), reduction="sum")
