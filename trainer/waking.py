"""How concept slots wake up at the switch to stage align: from the class means of the rows that come next.

Shapes: B rows, D width, R concepts, M labels of a row at most.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.topology import Topology


@dataclass(frozen=True)
class ClassMeans:
    """Mean normalised activation of each concept, means [R, D], over the counts [R] rows of all data
    ranks that list it."""

    means: Tensor
    counts: Tensor


def class_means(batches: Iterable[tuple[Tensor, Tensor]], concepts: int, width: int, topology: Topology) -> ClassMeans:
    """From (x [B, D], concept [B, M]) of this data rank's rows, summed in double over all data ranks."""
    sums = torch.zeros(concepts, width + 1, dtype=torch.float64, device=topology.device)
    for x, concept in batches:
        row, column = (concept >= 0).nonzero(as_tuple=True)
        listed = x[row].double()
        sums.index_add_(0, concept[row, column], torch.cat([listed, torch.ones_like(listed[:, :1])], dim=1))
    topology.sum_over_data(sums)
    counts = sums[:, -1]
    return ClassMeans((sums[:, :-1] / counts.clamp_min(1)[:, None]).float(), counts)


def concept_weights(classes: ClassMeans, gain: float = 1.0) -> dict[str, Tensor]:
    """W_enc [R, D], b_enc [R] and W_dec [R, D] of slots that wake up.

    With d_r = mean of concept r minus the mean over concepts, slot r has pre-activation +gain at its own mean and -gain
    at the mean over concepts: it starts alive, on its concept alone. Its decoder row starts from 0, since the free
    slots reconstruct d_r already and it would be there twice. A concept without rows stays at zero.
    """
    seen = classes.counts > 0
    centre = classes.means[seen].mean(dim=0) if seen.any() else torch.zeros_like(classes.means[:1]).sum(dim=0)
    difference = torch.where(seen[:, None], classes.means - centre, torch.zeros_like(classes.means))
    square = difference.square().sum(dim=1).clamp_min(1e-12)
    encoder = 2.0 * gain * difference / square[:, None]
    bias = torch.where(seen, -(encoder @ centre) - gain, torch.zeros_like(square))
    return {"W_enc": encoder, "b_enc": bias, "W_dec": torch.zeros_like(difference)}
