"""Scores of concepts on the rows of a split, and what trainer.scores says of them: of concept slots, or of a rival.

Shapes: B rows of a batch, N rows of a split, R concepts, g of them looked at together.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from trainer.analysis.binding_matrix import binding, confusion_matrix
from trainer.analysis.rows import RowSource
from trainer.dictionary import BankWeights, ConceptDictionary
from trainer.labels import known, listing, membership
from trainer.scores import SlotScores, label_figures, slot_groups

Scorer = Callable[[Tensor], Tensor]  # raw activations [B, D] -> scores [B, R]


def slot_scores(dictionary: ConceptDictionary) -> Scorer:
    """The pre-activations of the concept slots."""
    return lambda acts: dictionary.concepts(BankWeights.pre_activations, dictionary.normalise(acts))


@torch.no_grad()
def _groups(scorer: Scorer, concepts: int, rows: RowSource, count: int) -> Iterator[SlotScores]:
    """All concepts, a group at a time; one pass over the `count` rows per group."""
    for slots in slot_groups(concepts, count):
        found: list[tuple[Tensor, ...]] = []
        for acts, concept in rows():
            parts = scorer(acts)[:, slots].T, membership(concept, concepts)[:, slots].T
            found.append((*parts, listing(concept), known(concept)))
        scores, member, lists, knows = (torch.cat(part, dim=-1) for part in zip(*found, strict=True))
        yield SlotScores(slots.start, scores, member, lists, knows)


def figures_of(scorer: Scorer, names: Sequence[str], split: RowSource, text: RowSource | None = None) -> dict[str, Any]:
    """scores.label_figures of the rows of a split and, behind them, of further rows that list no concept (`text`).

    names: of the concepts.
    """

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        yield from split()
        if text is not None:
            yield from text()

    count = sum(len(acts) for acts, _ in rows())
    return label_figures(names, _groups(scorer, len(names), rows, count))


@torch.no_grad()
def top1(scorer: Scorer, concepts: int, split: RowSource) -> float:
    """Share of the rows with concepts whose highest score is that of one of them, whether or not it says that any
    concept is there. Raises DataError where no row has a concept."""
    rows = (confusion_matrix(scorer(acts).argmax(dim=1), concept, concepts) for acts, concept in split())
    return binding(reduce(torch.add, rows)).slot_accuracy


def reader_figures(
    scorer: Scorer, names: Sequence[str], split: RowSource, text: RowSource | None = None
) -> dict[str, Any]:
    """Of another reader than slots: `top1`, and the means that figures_of has."""
    found = figures_of(scorer, names, split, text)
    figures = {"top1": top1(scorer, len(names), split)}
    figures |= {name: found["labels"][name] for name in ("auroc", "mean_average_precision")}
    return figures | ({"auroc_against_text": found["text"]["auroc"]} if "text" in found else {})
