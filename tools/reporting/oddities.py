"""What is odd about a run, in words."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

DEAD = 0.1  # share of slots from which it is worth a word
DENSE = 2  # last bins of the density: slots that are active on a share of 10^-0.5 of the rows or more
SPIKE, BEFORE = 3.0, 10  # times the median of so many lines before
WORSE = 1.25  # held-out FVU over that of the training rows
SLIGHTLY = 1.05  # times the unsupervised FVU, below which seeds differ as much


def oddities(
    metrics: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None, outcome: Mapping[str, Any] | None
) -> list[str]:
    """Sentences, empty where nothing is odd. outcome: of outcome.json, None where there is none."""
    return [*_of_training(metrics, outcome), *(_of_evaluation(evaluation) if evaluation else [])]


def _of_training(metrics: Sequence[Mapping[str, Any]], outcome: Mapping[str, Any] | None) -> Iterator[str]:
    last = metrics[-1] if metrics else {}
    if outcome is None:
        yield "Training has not ended, or was killed: there is no outcome.json."
    elif outcome["status"] != "finished":
        yield f"Training did not finish: {outcome['status']} at step {last.get('step', 0)}."
    if skipped := last.get("skipped_updates"):
        yield f"{skipped} updates were not made (skipped.jsonl says why)."
    for key, what in (("quarantined_blocks", "blocks were left out as damaged"), ("nonfinite_rows", "rows held NaN")):
        if last.get(key):
            yield f"{last[key]} {what}."
    yield from _spikes(metrics)


def _spikes(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The reconstruction alone: what else the loss holds changes with the stage and its weights."""
    values = [(line["step"], line["loss/rec"]) for line in metrics if line.get("loss/rec") is not None]
    found = [
        (step, value / usual)
        for place, (step, value) in enumerate(values)
        if place >= BEFORE
        and (usual := median(before for _, before in values[place - BEFORE : place])) > 0
        and value > SPIKE * usual
    ]
    if found:
        step, times = max(found, key=lambda item: item[1])
        yield (
            f"The reconstruction loss spikes at {len(found)} of {len(values)} lines of metrics.jsonl, at most to "
            f"{times:.1f} times its median before, at step {step}."
        )


def _of_evaluation(evaluation: Mapping[str, Any]) -> Iterator[str]:
    splits = [split for split in ("train", "heldout") if split in evaluation]
    fits = {split: evaluation[split]["reconstruction"] for split in splits}
    for split, fit in fits.items():
        if fit["dead"] > DEAD:
            yield f"{fit['dead']:.1%} of the slots are active on no {_rows(split)} row."
        if dense := sum(fit.get("density", [])[-DENSE:]):
            yield f"{dense} free slots are active on more than {10 ** (-DENSE / 4):.0%} of the {_rows(split)} rows."
    if len(splits) == 2 and _above(fits["heldout"]["fvu"], fits["train"]["fvu"], WORSE):
        times = fits["heldout"]["fvu"] / fits["train"]["fvu"]
        yield f"FVU of held-out rows is {times:.2f} times that of training rows."
    for split, fit in fits.items():
        plain = (evaluation.get("unsupervised") or {}).get(split, {}).get("reconstruction", {}).get("fvu")
        if _above(fit["fvu"], plain, SLIGHTLY):
            yield (
                f"FVU of {_rows(split)} rows is above that of the unsupervised dictionary: {fit['fvu']:.4f} instead of "
                f"{plain:.4f}, at L0 {fit['l0']:.1f} instead of "
                f"{evaluation['unsupervised'][split]['reconstruction']['l0']:.1f}."
            )
    yield from evaluation.get("notes", [])
    for split in splits:
        silent = [name for name, alive in evaluation[split].get("binding", {}).get("alive", {}).items() if not alive]
        if silent:
            more = f" and {len(silent) - 5} more" if len(silent) > 5 else ""
            yield f"Concept slots that are active on no {_rows(split)} row: {', '.join(silent[:5])}{more}."
        outliers = evaluation[split].get("outliers")
        if outliers:
            yield f"{outliers['rows']} {_rows(split)} rows have giant norms, and carry much of the variance."


def _rows(split: str) -> str:
    return {"train": "training", "heldout": "held-out"}[split]


def _above(value: float | None, other: float | None, times: float) -> bool:
    return value is not None and other is not None and value > times * other
