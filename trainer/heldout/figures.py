"""How well the dictionary in training does on held-out rows.

Every rank looks at its share; sums and scores meet over ranks, so that the figures are those of all rows under every
strategy. Nothing here changes the state of training.

Shapes: N held-out rows of a source, n of them on this rank, B of a batch, D width, R concepts.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainer.heldout.rows import Part
from trainer.labels import known, listing, membership
from trainer.scores import SlotScores, label_figures, predicted_slots, slot_groups
from trainer.strategies import Strategy
from trainer.topology import Topology

PREFIX = "heldout/"  # of the figures in metrics.jsonl
# Figures that can choose a checkpoint, and whether a larger one is better.
LARGER_IS_BETTER = {
    "fvu": False,
    "slot_accuracy": True,
    "auroc": True,
    "average_precision": True,
    "text_auroc": True,
    "text_firing": False,
}
_SUMS = ("rows", "active", "concept_active", "residual", "square", "listing", "right")


@torch.no_grad()
def heldout_figures(strategy: Strategy, parts: Sequence[Part], align: bool, most: int) -> dict[str, float]:
    """Figures of all held-out rows, by the names that they have in metrics.jsonl. Called on all ranks.

    parts: the rows, by source. align: whether the concept slots are awake. most: rows of a forward pass on a rank.

    FVU about the mean of the rows, and L0; where concept slots are awake the share of rows with concepts whose
    strongest slot is one of theirs, and of scores.label_figures the means over concepts. What cannot be known is
    absent.
    """
    topology, dictionary = strategy.topology, strategy.objective.dictionary
    sums = torch.zeros(len(parts), len(_SUMS) + dictionary.width, dtype=torch.float64, device=topology.device)
    active = sums[:, 0].clone()
    scores = []
    for number, part in enumerate(parts):
        seen = [_look(strategy, rows, align, sums[number]) for rows in _batches(part, topology, most)]
        active[number] = torch.stack([entries for entries, _ in seen]).sum()
        scores.append(torch.cat([pre for _, pre in seen]))
    sums[:, _SUMS.index("active")] = topology.sum_over_dictionary(active)
    topology.sum_over_data(sums)
    found = _of_sums(sums.sum(dim=0))
    if len(parts) > 1:
        for part, own in zip(parts, sums, strict=True):
            found |= {f"{part.name}/{name}": value for name, value in _of_sums(own).items() if name in ("fvu", "l0")}
    if align and dictionary.concept_names:
        groups = _groups(parts, scores, len(dictionary.concept_names), topology)
        found |= _of_labels(label_figures(dictionary.concept_names, groups))
    else:
        found.pop("slot_accuracy")
    return {PREFIX + name: value for name, value in found.items() if math.isfinite(value)}


def _batches(part: Part, topology: Topology, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's rows and labels on the device; as many batches on every rank, since banks may be gathered."""
    largest = math.ceil(len(part.concept) / topology.data_world)
    count = math.ceil(largest / most)
    for acts, concept in zip(part.acts.tensor_split(count), part.concept[part.own].tensor_split(count), strict=True):
        yield acts.to(topology.device), concept.to(topology.device)


def _look(strategy: Strategy, rows: tuple[Tensor, Tensor], align: bool, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Add what a batch comes to to _SUMS, and behind them to the sum of x [D]; returns active entries of the free slots
    held here, and pre-activations [B, R] of concept slots."""
    acts, concept = rows
    look = strategy.objective.look(acts, align)
    chosen = predicted_slots(look.pre.clamp_min(0))[:, None]
    values: dict[str, Tensor | int] = {
        "rows": len(acts),
        "concept_active": (look.pre > 0).sum(),
        "residual": (look.x - look.x_hat).double().square().sum(),
        "square": look.x.double().square().sum(),
        "listing": listing(concept).sum(),
        "right": ((chosen == concept) & (chosen >= 0)).any(dim=1).sum(),
    }
    for name, value in values.items():
        sums[_SUMS.index(name)] += value
    sums[len(_SUMS) :] += look.x.double().sum(dim=0)
    return look.active.double(), look.pre


def _groups(parts: Sequence[Part], scores: Sequence[Tensor], concepts: int, topology: Topology) -> Iterator[SlotScores]:
    """The scores of all rows of all ranks, a group of slots at a time. scores: of each part, [n, R]."""
    concept = torch.cat([part.concept for part in parts]).to(topology.device)
    for slots in slot_groups(concepts, len(concept)):
        whole = torch.zeros(slots.stop - slots.start, len(concept), device=topology.device)
        first = 0
        for part, mine in zip(parts, scores, strict=True):
            whole[:, first + part.own.start : first + part.own.stop] = mine[:, slots].T
            first += len(part.concept)
        member = membership(concept, concepts)[:, slots].T
        yield SlotScores(slots.start, topology.sum_over_data(whole), member, listing(concept), known(concept))


def _of_sums(sums: Tensor) -> dict[str, float]:
    """Figures from _SUMS and the sum of x [D]."""
    total = dict(zip(_SUMS, sums.tolist(), strict=False))
    rows = max(total["rows"], 1.0)
    variance = total["square"] - float(sums[len(_SUMS) :].square().sum()) / rows
    return {
        "fvu": total["residual"] / variance if variance > 0 else math.nan,
        "l0": (total["active"] + total["concept_active"]) / rows,
        "slot_accuracy": total["right"] / total["listing"] if total["listing"] else math.nan,
    }


def _of_labels(found: dict[str, dict[str, float | None]]) -> dict[str, float]:
    labels, text = found["labels"], found.get("text", {})
    figures = {
        "auroc": labels["auroc"],
        "average_precision": labels["mean_average_precision"],
        "text_auroc": text.get("auroc"),
        "text_firing": text.get("concept_firing_rate"),
        "text_any_firing": text.get("any_concept_firing_rate"),
        "text_activation": text.get("concept_activation"),
    }
    return {name: value for name, value in figures.items() if value is not None}
