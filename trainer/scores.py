"""How well concept slots tell the rows that have their concept from those that do not: functions of scores and labels.

Training looks at held-out rows with them, analysis at what was trained. A slot's score is its pre-activation, which
orders rows below the gate too; it fires where its code, the score above 0, is not 0.

Shapes: B rows of a batch, N rows of a split, R concepts, M labels of a row at most, g slots looked at together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Scores [g, N] are held of as many slots as fit here, of one slot at least.
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


def predicted_slots(concept_code: Tensor) -> Tensor:
    """The concept slot [B] that each row chooses from its code [B, R]; -1 where no concept slot is active.

    Where any slot is active this is the argmax of the pre-activations too. A row that activates none says nothing
    about its concept: it is counted as silent (wrong), never as slot 0 or as the least negative pre-activation.
    """
    if concept_code.shape[1] == 0:
        return concept_code.new_full((concept_code.shape[0],), -1, dtype=torch.int64)
    strength, slot = concept_code.max(dim=1)
    return torch.where(strength > 0, slot, -1)


@dataclass
class SlotScores:
    """Of the slots from `first` on: scores fp32 [g, N] and whether a row lists their concept, bool [g, N]; and for all
    rows whether they list a concept, and whether they are known, bool [N]."""

    first: int
    scores: Tensor
    member: Tensor
    listing: Tensor
    known: Tensor


def slot_groups(concepts: int, rows: int) -> list[slice]:
    """Runs of slots whose scores of all rows are held together."""
    size = max(1, SCORES_BYTES // (5 * max(rows, 1)))
    return [slice(first, min(first + size, concepts)) for first in range(0, concepts, size)]


def label_figures(names: Sequence[str], groups: Iterable[SlotScores]) -> dict[str, Any]:
    """`labels` and, where rows list no concept, `text` of N rows, as JSON values (NaN becomes None).

    names: of the concepts, one at least; groups: the scores of all their slots on the same rows.

    `labels`: how many rows list a concept, have none, are unknown; per concept how often its slot fires on its own
    rows, on other known rows, on those of them that have none, on unknown rows, and on text; AUROC and average
    precision of its own rows against known rows without it, AUROC of its own rows against text; and means over
    concepts. `text`, the rows that list no concept: how often slots fire, a slot on average and any of them; the mean
    activation of a slot; and the mean over concepts of AUROC of a concept's rows against them.
    """
    per_concept: dict[str, dict[str, Any]] = {}
    kinds: dict[str, int] = {}
    activations: list[float] = []
    any_fires = without = torch.zeros(0, dtype=torch.bool)
    for group in groups:
        without, none = ~group.listing, group.known & ~group.listing
        kinds = {"listing": int(group.listing.sum()), "none": int(none.sum()), "unknown": int((~group.known).sum())}
        fired = (group.scores > 0).any(dim=0)
        any_fires = any_fires | fired if len(any_fires) else fired
        for number, (score, own) in enumerate(zip(group.scores, group.member, strict=True), start=group.first):
            others = group.known & ~own
            fires = score > 0
            parts = {"own": own, "others": others, "none": none, "unknown": ~group.known, "text": without}
            activations.append(_share(score[without].clamp_min(0)))
            per_concept[names[number]] = {
                "rows": int(own.sum()),
                "firing_rate": {name: _share(fires[part]) for name, part in parts.items()},
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
    result: dict[str, Any] = {"labels": labels}
    if without.any():
        result["text"] = {
            "rows": int(without.sum()),
            "concept_firing_rate": _mean([one["firing_rate"]["text"] for one in found]),
            "any_concept_firing_rate": _share(any_fires[without]),
            "concept_activation": _mean(activations),
            "auroc": _mean([one["auroc_against_text"] for one in found]),
        }
    return _plain(result)


def _share(values: Tensor) -> float:
    """Their mean; NaN of none."""
    return float(values.double().mean()) if len(values) else float("nan")


def _mean(values: Sequence[float]) -> float:
    """Over what can be known."""
    there = [value for value in values if not np.isnan(value)]
    return float(np.mean(there)) if there else float("nan")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value
