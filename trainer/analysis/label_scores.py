"""How well concept slots tell the rows that have their concept from those that do not: functions of scores and labels.

A slot's score is its pre-activation, which orders rows below the gate too; it fires where its code is above 0.

Shapes: B rows of a batch, N rows of a split, R concepts, M labels of a row at most, g slots looked at together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.analysis.rows import RowSource
from trainer.dictionary import BankWeights, ConceptDictionary
from trainer.labels import known, listing, membership

# Scores [g, N] are held of as many slots as fit here, of one slot at least; more slots mean more passes over the rows.
SCORES_BYTES = 1 << 30


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a score of `positive` [P] is above one of `negative` [Q], ties counted half; NaN without either."""
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive) + torch.searchsorted(ordered, positive, right=True)
    return float(below.double().sum()) / (2.0 * len(positive) * len(negative))


def average_precision(positive: Tensor, negative: Tensor) -> float:
    """Mean over scores of `positive` [P] of the precision where all rows from that score on are taken; NaN without any.

    negative: [Q]. Ties are taken together.
    """
    if not len(positive):
        return float("nan")
    own, ordered = positive.sort().values, negative.sort().values
    right = len(own) - torch.searchsorted(own, positive)
    wrong = len(ordered) - torch.searchsorted(ordered, positive)
    return float((right.double() / (right + wrong)).mean())


@dataclass
class _Split:
    """Of the slots from `first` on: scores fp32 [g, N] and whether a row lists their concept, bool [g, N]; and for all
    rows whether they list a concept, and whether they are known, bool [N]."""

    first: int
    scores: Tensor
    member: Tensor
    listing: Tensor
    known: Tensor


@torch.no_grad()
def _groups(dictionary: ConceptDictionary, rows: RowSource, count: int) -> Iterator[_Split]:
    """All concept slots, a group at a time; one pass over the `count` rows per group."""
    concepts, device = len(dictionary.concept_names), dictionary.mean.device
    size = max(1, SCORES_BYTES // (5 * count))
    for first in range(0, concepts, size):
        slots = slice(first, min(first + size, concepts))
        scores = torch.empty(slots.stop - first, count, device=device)
        member = torch.empty(scores.shape, dtype=torch.bool, device=device)
        lists, knows = (torch.empty(count, dtype=torch.bool, device=device) for _ in range(2))
        start = 0
        for acts, concept in rows():
            here = slice(start, start + len(acts))
            pre = dictionary.concepts(BankWeights.pre_activations, dictionary.normalise(acts))
            scores[:, here] = pre[:, slots].T
            member[:, here] = membership(concept, concepts)[:, slots].T
            lists[here], knows[here] = listing(concept), known(concept)
            start += len(acts)
        yield _Split(first, scores, member, lists, knows)


def label_figures(dictionary: ConceptDictionary, split: RowSource, text: RowSource | None = None) -> dict[str, Any]:
    """`labels` and, where rows list no concept, `text` of one split, as JSON values (NaN becomes None).

    split: its rows; text: further ones that list no concept.

    `labels`: how many rows list a concept, have none, are unknown; per concept how often its slot fires on its own
    rows, on other known rows, on those of them that have none, on unknown rows, and on text; AUROC and average
    precision of its own rows against known rows without it, AUROC of its own rows against text; and means over
    concepts. `text`, the rows that list no concept: how often slots fire, a slot on average and any of them; and the
    mean over concepts of AUROC of a concept's rows against them.
    """

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        yield from split()
        if text is not None:
            yield from text()

    per_concept: dict[str, dict[str, Any]] = {}
    kinds: dict[str, int] = {}
    count = sum(len(acts) for acts, _ in rows())
    any_fires = torch.zeros(count, dtype=torch.bool, device=dictionary.mean.device)
    without = torch.zeros_like(any_fires)
    for group in _groups(dictionary, rows, count):
        without, none = ~group.listing, group.known & ~group.listing
        kinds = {"listing": int(group.listing.sum()), "none": int(none.sum()), "unknown": int((~group.known).sum())}
        for number, (score, own) in enumerate(zip(group.scores, group.member, strict=True), start=group.first):
            others = group.known & ~own
            fires = score > 0
            any_fires |= fires
            parts = {"own": own, "others": others, "none": none, "unknown": ~group.known, "text": without}
            per_concept[dictionary.concept_names[number]] = {
                "rows": int(own.sum()),
                "firing_rate": {name: _rate(fires[part]) for name, part in parts.items()},
                "auroc": auroc(score[own], score[others]),
                "average_precision": average_precision(score[own], score[others]),
                "auroc_against_text": auroc(score[own], score[without]),
            }
    found = per_concept.values()
    labels = {
        "rows": kinds,
        "auroc": _mean([one["auroc"] for one in found]),
        "mean_average_precision": _mean([one["average_precision"] for one in found]),
        "per_concept": per_concept,
    }
    result = {"labels": labels}
    if without.any():
        result["text"] = {
            "rows": int(without.sum()),
            "concept_firing_rate": _mean([one["firing_rate"]["text"] for one in found]),
            "any_concept_firing_rate": _rate(any_fires[without]),
            "auroc": _mean([one["auroc_against_text"] for one in found]),
        }
    return _plain(result)


def _rate(fires: Tensor) -> float:
    return float(fires.double().mean()) if len(fires) else float("nan")


def _mean(values: Sequence[float]) -> float:
    """Over what can be known."""
    there = [value for value in values if not np.isnan(value)]
    return float(np.mean(there)) if there else float("nan")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value
