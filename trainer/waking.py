"""How concept slots wake up at the switch to stage align: from the class means of the rows that come next.

Shapes: B rows, D width, R concepts, M labels of a row at most.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.labels import known
from trainer.topology import Topology


@dataclass(frozen=True)
class ClassMeans:
    """Mean normalised activations over rows of all data ranks: means [R, D] of the counts [R] rows that list a concept,
    and others [R, D] of the other_counts [R] rows that do not and are not unknown."""

    means: Tensor
    counts: Tensor
    others: Tensor
    other_counts: Tensor


def class_means(batches: Iterable[tuple[Tensor, Tensor]], concepts: int, width: int, topology: Topology) -> ClassMeans:
    """From (x [B, D], concept [B, M]) of this data rank's rows, summed in double over all data ranks."""
    # The last row is that of all rows that are not unknown, the last column counts.
    sums = torch.zeros(concepts + 1, width + 1, dtype=torch.float64, device=topology.device)
    for x, concept in batches:
        row, column = (concept >= 0).nonzero(as_tuple=True)
        counting = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).double()
        sums.index_add_(0, concept[row, column], counting[row])
        sums[-1] += counting[known(concept)].sum(dim=0)
    topology.sum_over_data(sums)
    with_it, without_it = sums[:-1], sums[-1] - sums[:-1]
    means, others = ((part[:, :-1] / part[:, -1:].clamp_min(1)).float() for part in (with_it, without_it))
    return ClassMeans(means, with_it[:, -1], others, without_it[:, -1])


def concept_weights(classes: ClassMeans, binding: str = "softmax", gain: float = 1.0) -> dict[str, Tensor]:
    """W_enc [R, D], b_enc [R] and W_dec [R, D] of slots that wake up.

    With d_r = mean of concept r minus a reference, slot r has pre-activation +gain at its own mean and -gain at the
    reference: it starts alive, on its concept alone. Where concepts exclude each other (binding softmax), the reference
    is the mean over concepts; where they are independent (sigmoid), the mean of the rows without the concept, as far as
    there are any. The decoder row starts from 0, since the free slots reconstruct d_r already and it would be there
    twice. A concept without rows stays at zero.
    """
    seen = classes.counts > 0
    centre = classes.means[seen].mean(dim=0) if seen.any() else torch.zeros_like(classes.means[:1]).sum(dim=0)
    reference = centre.expand_as(classes.means)
    if binding == "sigmoid":
        reference = torch.where(classes.other_counts[:, None] > 0, classes.others, reference)
    difference = torch.where(seen[:, None], classes.means - reference, torch.zeros_like(classes.means))
    square = difference.square().sum(dim=1).clamp_min(1e-12)
    encoder = 2.0 * gain * difference / square[:, None]
    bias = torch.where(seen, -(encoder * reference).sum(dim=1) - gain, torch.zeros_like(square))
    return {"W_enc": encoder, "b_enc": bias, "W_dec": torch.zeros_like(difference)}
