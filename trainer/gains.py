"""What steering needs of each concept slot: its gain, the mean activation on the rows of its own concept, which is the
unit of strengths; and, where its decoder row learned to write nothing, what it writes.

Shapes: B rows, D width, R concepts, M labels of a row at most.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.errors import UserError
from trainer.topology import Topology
from trainer.waking import class_means, differences


class Measured(NamedTuple):
    """gains [R]: 0 for a concept without a row. written [R, D] fp32: the difference that a concept makes
    (waking.differences), by the gain of its slot, so that the slot at its gain writes it; 0 where the gain is.
    complete: whether every concept has a row."""

    gains: list[float]
    written: Tensor
    complete: bool


def measure_concepts(
    weights: BankWeights, batches: Iterable[tuple[Tensor, Tensor]], topology: Topology, binding: str
) -> Measured | None:
    """Over the rows of all data ranks; called on all ranks.

    weights: of the concept slots, on the device of the rows. batches: (x [B, D] normalised, concept [B, M]) of this
    data rank. binding: see LossConfig. None when a rank could not read its rows, since a mean over the others would be
    another one.
    """
    slots, width = weights.W_enc.shape
    sums = torch.zeros(2 * slots + 1, dtype=torch.float64, device=weights.b_enc.device)

    def summed() -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for x, concept in batches:
                row, column = (concept >= 0).nonzero(as_tuple=True)
                slot = concept[row, column]
                sums[:slots].index_add_(0, slot, weights.encode_one(x[row], slot).double())
                sums[slots:-1] += torch.bincount(slot, minlength=slots)
                yield x, concept
        except (OSError, UserError):
            sums[-1] = 1

    classes = class_means(summed(), slots, width, topology)
    topology.sum_over_data(sums)
    if sums[-1]:
        return None
    gains = sums[:slots] / sums[slots:-1].clamp_min(1)
    unit = gains.float()[:, None]
    difference, _ = differences(classes, binding)
    written = torch.where(unit > 0, difference / unit.clamp_min(1e-12), 0.0)
    return Measured(gains.tolist(), written, bool((sums[slots:-1] > 0).all()))
