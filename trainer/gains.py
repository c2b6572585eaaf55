"""Gains: the mean activation of each concept slot on the rows of its own concept, the unit that steering is given in.

Shapes: B rows, D width, R concepts.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.errors import UserError
from trainer.topology import Topology


def concept_gains(
    weights: BankWeights, batches: Iterable[tuple[Tensor, Tensor]], topology: Topology
) -> list[float] | None:
    """Gains [R] over the rows of all data ranks; 0 for a concept without a row.

    weights: of the concept slots, on the device of the rows. batches: (x [B, D] normalised, concept [B]) of this data
    rank, a row once for each concept that it lists. None when a rank could not read its rows, since a mean over the
    others would be another one. Called on all ranks.
    """
    slots = len(weights.b_enc)
    sums = torch.zeros(2 * slots + 1, dtype=torch.float64, device=weights.b_enc.device)
    try:
        for x, concept in batches:
            sums[:slots].index_add_(0, concept, weights.encode_one(x, concept).double())
            sums[slots:-1] += torch.bincount(concept, minlength=slots)
    except (OSError, UserError):
        sums[-1] = 1
    topology.sum_over_data(sums)
    if sums[-1]:
        return None
    return (sums[:slots] / sums[slots:-1].clamp_min(1)).tolist()
