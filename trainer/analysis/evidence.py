"""Which figures of an evaluation stand on little, in words."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Below these, chance alone moves a figure by what one would read as a difference.
ROWS = 1000  # of a split, for FVU and L0; of text, for how often slots fire on it
OWN_ROWS, DOCUMENTS = 50, 5  # of a concept: its rows, and texts or prompts that they are from
TEMPLATES = 3
ANSWERS, TOKENS = 100, 10_000  # that a loss is the mean of
NAMED = 5  # concepts that are named

_SPLITS = {"train": "training", "heldout": "held-out"}


def notes(evaluation: Mapping[str, Any], templates: Mapping[str, int] | None = None) -> list[str]:
    """Sentences about an evaluation as `alignsae evaluate` writes it; empty where all stands on enough.

    templates: of the prompts of each split, where they are known.
    """
    return [*_of_splits(evaluation), *_of_templates(templates or {}), *_of_losses(evaluation)]


def _of_splits(evaluation: Mapping[str, Any]) -> Iterator[str]:
    for split, name in _SPLITS.items():
        if split not in evaluation:
            continue
        part = evaluation[split]
        if part["rows"] < ROWS:
            yield f"FVU and L0 of {name} rows stand on {part['rows']} rows."
        labels = part.get("labels", {})
        rows = {concept: one["rows"] for concept, one in labels.get("per_concept", {}).items()}
        if few := _listed({concept: n for concept, n in rows.items() if n < OWN_ROWS}, "row"):
            yield f"Figures of concepts on {name} rows stand on few rows of their own: {few}."
        documents = {concept: n for concept, n in labels.get("documents", {}).items() if rows[concept]}
        if few := _listed({concept: n for concept, n in documents.items() if n < DOCUMENTS}, "document"):
            yield f"Rows of concepts on the {name} side are from few documents, and rows of one are alike: {few}."
        text = part.get("text")
        if labels and text is None:
            yield f"No {name} row is without a concept: whether slots are silent elsewhere is not known (--text)."
        elif text and text["rows"] < ROWS:
            yield (
                f"How often slots fire without a concept stands on {text['rows']} {name} rows: "
                f"shares below {1 / text['rows']:.1%} cannot be seen."
            )


def _of_templates(templates: Mapping[str, int]) -> Iterator[str]:
    for split, name in _SPLITS.items():
        if 0 < (count := templates.get(split, 0)) < TEMPLATES:
            yield (
                f"The {name} prompts have {count} template{'s' if count > 1 else ''}: "
                "how slots do on other wordings is not known."
            )


def _of_losses(evaluation: Mapping[str, Any]) -> Iterator[str]:
    answers = evaluation.get("loss_recovered", {}).get("prompts", ANSWERS)
    if answers < ANSWERS:
        yield f"The loss recovered on answers stands on {answers} prompts."
    tokens = evaluation.get("text_loss_recovered", {}).get("tokens", TOKENS)
    if tokens < TOKENS:
        yield f"The loss recovered on text stands on {tokens} tokens."


def _listed(counts: Mapping[str, int], unit: str) -> str:
    """`a (1 row), b (3 rows) and 2 more`, the fewest first."""
    ordered: Sequence[tuple[str, int]] = sorted(counts.items(), key=lambda item: item[1])
    named = ", ".join(f"{name} ({n} {unit}{'' if n == 1 else 's'})" for name, n in ordered[:NAMED])
    return named + (f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else "")
