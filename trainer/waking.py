"""How concept slots wake up at the switch to stage align: from the class means of the rows that come next; and what
they write where no decoder row was learned for them.

Shapes: B rows, D width, R concepts, M labels of a row at most.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.labels import known, listing
from trainer.topology import Topology

QUIET = 5.0  # active concept slots of a row at the waking, by the concepts that it lists, at most and on average
FAINT = 1.0  # pre-activation of a slot at the waking on the one of its own rows on which it is strongest, at least
SHRINKAGE = 0.1
GRID, HIGHEST = 128, 64  # steps of a unit, and units, in which a bias is lowered


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


def differences(classes: ClassMeans, binding: str = "softmax") -> tuple[Tensor, Tensor]:
    """Of each concept the mean of its rows minus a reference, and that reference, both [R, D].

    Where concepts exclude each other (binding softmax), the reference is the mean over concepts; elsewhere the mean of
    the rows without the concept, as far as there are any. The difference of a concept without rows is 0.
    """
    seen = classes.counts > 0
    centre = classes.means[seen].mean(dim=0) if seen.any() else torch.zeros_like(classes.means[:1]).sum(dim=0)
    reference = centre.expand_as(classes.means)
    if binding != "softmax":
        reference = torch.where(classes.other_counts[:, None] > 0, classes.others, reference)
    return torch.where(seen[:, None], classes.means - reference, torch.zeros_like(classes.means)), reference


def scatter(batches: Iterable[tuple[Tensor, Tensor]], classes: ClassMeans, topology: Topology) -> Tensor:
    """Covariance of the rows of a concept about its mean, pooled over concepts and data ranks, [D, D] fp64.

    It is shrunk towards the same variance in all directions, by a tenth of the D directions over the N rows: with fewer
    rows than directions nothing is known of most of them.
    """
    width = classes.means.shape[1]
    sums = torch.zeros(width, width, dtype=torch.float64, device=topology.device)
    for x, concept in batches:
        row, column = (concept >= 0).nonzero(as_tuple=True)
        apart = x[row].double() - classes.means[concept[row, column]].double()
        sums += apart.T @ apart
    rows = classes.counts.sum().clamp_min(1)
    covariance = topology.sum_over_data(sums) / rows
    shrinkage = SHRINKAGE * covariance.diagonal().mean() * width / rows
    return covariance + shrinkage.clamp_min(1e-12) * torch.eye(width, dtype=torch.float64, device=topology.device)


def concept_weights(
    classes: ClassMeans, binding: str = "softmax", gain: float = 1.0, covariance: Tensor | None = None
) -> dict[str, Tensor]:
    """W_enc [R, D], b_enc [R] and W_dec [R, D] of slots that wake up.

    With d_r = mean of concept r minus its reference (`differences`), slot r has pre-activation +gain at its own mean
    and -gain at the reference: it starts alive, on its concept alone. It reads along d_r, or with the covariance C
    [D, D] of `scatter` along C^-1 d_r, Fisher's discriminant; gains are then in proportion to d_r C^-1 d_r, in which a
    softmax weighs evidence, with a mean of log(R) / 2, at which the softmax of R slots tells anything. The decoder row
    starts from 0, since the free slots reconstruct d_r already and it would be there twice. A concept without rows
    stays at zero.
    """
    difference, reference = differences(classes, binding)
    along, seen = difference, classes.counts > 0
    if covariance is not None:
        along = torch.linalg.solve(covariance, difference.T.double()).T.float()
    square = (along * difference).sum(dim=1).clamp_min(1e-12)
    gains = torch.full_like(square, gain)
    if covariance is not None:
        gains *= max(1.0, math.log(int(seen.sum())) / 2) * square / square[seen].mean()
    encoder = 2.0 * gains[:, None] * along / square[:, None]
    bias = torch.where(seen, -(encoder * reference).sum(dim=1) - gains, torch.zeros_like(square))
    return {"W_enc": encoder, "b_enc": bias, "W_dec": torch.zeros_like(difference)}


def lowering(weights: dict[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]], topology: Topology) -> float:
    """By how much to lower the biases of slots that wake up and exclude each other, so that on the rows of all data
    ranks that list a concept no more than QUIET of them are active for each that is listed; 0 where that holds.

    weights: of `concept_weights`. batches: as of `class_means`.

    Where classes lie closer together than their rows scatter, as a thousand of them do, the middle between a class and
    the others has many rows on its wrong side. Hundreds of slots would then be active on a row, and their decoder rows
    learn at once. One shift for all is nothing to a softmax over them.
    """
    encoder, bias = weights["W_enc"].double(), weights["b_enc"].double()
    # How many pre-activations lie in each step; at last how many concepts are listed.
    counts = torch.zeros(GRID * HIGHEST + 1, dtype=torch.int64, device=encoder.device)
    for x, concept in batches:
        labelled = listing(concept)
        pre = x[labelled].double() @ encoder.T + bias
        place = (pre[pre > 0] * GRID).long().clamp_max(GRID * HIGHEST - 1)
        counts[:-1] += torch.bincount(place, minlength=GRID * HIGHEST)
        counts[-1] += (concept >= 0).sum()
    topology.sum_over_data(counts)
    above = counts[:-1].flip(0).cumsum(0).flip(0)
    return int((above > QUIET * counts[-1]).sum()) / GRID


def strongest(weights: dict[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]], topology: Topology) -> Tensor:
    """The largest pre-activation [R] fp64 of each slot on the rows of all data ranks that list its concept; +inf
    without any. weights and batches as of `lowering`."""
    encoder, bias = weights["W_enc"].double(), weights["b_enc"].double()
    found = torch.full_like(bias, -math.inf)
    for x, concept in batches:
        row, column = (concept >= 0).nonzero(as_tuple=True)
        own = concept[row, column].long()
        pre = (x[row].double() * encoder[own]).sum(dim=1) + bias[own]
        found.scatter_reduce_(0, own, pre, "amax")
    topology.max_over_data(found)
    return torch.where(found == -math.inf, math.inf, found)


def exclusive_weights(
    classes: ClassMeans, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], topology: Topology
) -> dict[str, Tensor]:
    """`concept_weights` of concepts that exclude each other. batches() begins the labelled rows anew.

    Where the slots would not be quiet along the differences of the means, they read along Fisher's discriminants
    instead, and their biases are lowered as far as those need it. A softmax never raises all of them again, so a slot
    that slept on all of its rows then would sleep for good: its own bias is lowered less.
    """
    weights = concept_weights(classes)
    if lowering(weights, batches(), topology):
        weights = concept_weights(classes, covariance=scatter(batches(), classes, topology))
        weights["b_enc"] -= lowering(weights, batches(), topology)
        weights["b_enc"] += (FAINT - strongest(weights, batches(), topology)).clamp_min(0).to(weights["b_enc"])
    return weights
