"""Figures of a run's report: each function takes parsed result files and returns a matplotlib figure.

Colours are those of Okabe and Ito and the cividis map, which stay apart under colour blindness; lines differ in marker
and dash as well.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.analysis.binding_matrix import restored
from trainer.analysis.evaluation import DECADES
from trainer.losses import TERMS

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#555555"
LABELLED = 24  # concepts up to which every one is named and every cell is written out
STYLES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":"), (PURPLE, (0, (5, 1, 1, 1, 1, 1)))]


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    axes = np.atleast_1d(figure.subplots(rows, columns, **kwargs)).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def matrix_side(names: Sequence[str]) -> float:
    """Inches of a matrix with these rows: room for every cell's number while there are numbers."""
    return 1.9 + 0.52 * len(names) if len(names) <= LABELLED else 6.5


def draw_matrix(ax: Axes, share: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Any:
    """Shares in [0, 1] as colours, NaN left white; names and numbers while they are legible."""
    ax.spines[:].set_visible(False)
    image = ax.imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto" if len(rows) > LABELLED else "equal")
    if len(rows) > LABELLED:
        return image
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)
    for (r, c), value in np.ndenumerate(share):
        if not np.isnan(value):
            shade = "black" if value > 0.55 else "white"
            ax.text(c, r, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=8)
    return image


def binding_plot(evaluation: Mapping[str, Any]) -> Figure:
    """Confusion of the chosen concept slot against the true concept, per split."""
    splits = [s for s in ("train", "heldout") if s in evaluation]
    names = evaluation["concepts"]
    side = matrix_side(names)
    figure, axes = new_figure(side * len(splits) + 1, side, len(splits), sharey=True)
    for ax, split in zip(axes, splits, strict=True):
        bound = evaluation[split]["binding"]
        counts = restored(bound["confusion"], len(names)).numpy()
        total = counts.sum(axis=1, keepdims=True)
        share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
        image = draw_matrix(ax, share, names, [*names, "none active"])
        title = {"train": "training templates", "heldout": "held-out templates"}[split]
        ax.set_title(f"{title}: diagonal {bound['diagonal_accuracy']:.3f}", fontsize=10)
        ax.set_xlabel("strongest concept slot")
    axes[0].set_ylabel("true concept")
    figure.colorbar(image, ax=axes, label="share of the concept's rows", shrink=0.85)
    return figure


def fragmentation_plot(evaluation: Mapping[str, Any]) -> Figure:
    """EffFeat per concept: over the concept slots, all slots, and all slots of the unsupervised dictionary."""
    spread = evaluation["train"]["fragmentation"]
    series = [
        ("aligned, concept slots", spread["concept_slots"], BLUE, ""),
        ("aligned, all slots", spread["all"], ORANGE, "//"),
    ]
    if "unsupervised" in evaluation:
        series.append(
            ("unsupervised, all slots", evaluation["unsupervised"]["train"]["fragmentation"]["all"], GREY, "..")
        )
    names = evaluation["concepts"]
    figure, (ax,) = new_figure(max(8.5, 3.2 + 0.85 * len(names)) if len(names) <= LABELLED else 8.5, 4.2)
    values = [[or_nan(part["per_concept"][n]["efffeat"]) for n in names] for _, part, _, _ in series]
    labels = [f"{name} (mean {or_nan(part['efffeat']):.3g})" for name, part, _, _ in series]
    if len(names) <= LABELLED:
        width = 0.8 / len(series)
        for i, (_, _, colour, hatch) in enumerate(series):
            place = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
            bars = ax.bar(place, values[i], width, color=colour, hatch=hatch, edgecolor="white", label=labels[i])
            ax.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        ax.set_xticks(range(len(names)), names)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(series), frameon=False)
    else:
        ax.boxplot([[v for v in row if not np.isnan(v)] for row in values], tick_labels=labels)
    ax.set(yscale="log", ylabel="EffFeat: slots that a concept is spread over")
    ax.set_ylim(bottom=0.8)
    ax.axhline(1, color="black", lw=0.8)
    return figure


def density_plot(evaluation: Mapping[str, Any]) -> Figure:
    """How many free slots are active on which share of the rows, of those that are on any."""
    figure, (ax,) = new_figure(8.5, 3.4)
    found = [
        (split, evaluation[split]["reconstruction"]["density"]) for split in ("train", "heldout") if split in evaluation
    ]
    if plain := evaluation.get("unsupervised"):
        found += [("unsupervised, train", plain["train"]["reconstruction"]["density"])]
    edges = np.logspace(-DECADES, 0, len(found[0][1]) + 1)
    for (name, counts), (colour, dash) in zip(found, cycle(STYLES), strict=False):
        ax.stairs(counts, edges, color=colour, ls=dash, lw=1.6, label=name)
    first = min(np.flatnonzero(counts).min(initial=len(counts) - 1) for _, counts in found)
    ax.set(xscale="log", xlabel="share of rows on which a free slot is active", ylabel="slots", xlim=(edges[first], 1))
    ax.legend(frameon=False, fontsize=9)
    return figure


def loss_plot(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """The loss and its terms (unweighted) over steps, one panel each for the total and the terms."""
    figure, (left, right) = new_figure(10.5, 3.9, 2)
    # Stages weigh different terms, so the totals of two stages are not joined by a line.
    for stage in dict.fromkeys(m.get("stage") for m in metrics):
        left.plot(*_series([m for m in metrics if m.get("stage") == stage], "loss"), color="black", lw=1.2)
    left.set(title="loss", yscale="log" if min(_series(metrics, "loss")[1], default=0) > 0 else "linear")
    for term, (colour, dash) in zip(TERMS, cycle(STYLES), strict=False):
        steps, values = _series(metrics, f"loss/{term.name}")
        positive = [v if v > 0 else np.nan for v in values]
        if not np.isnan(positive).all():
            right.plot(steps, positive, color=colour, ls=dash, lw=1.4, label=term.name)
    right.set(title="terms, unweighted", yscale="log")
    right.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for ax in (left, right):
        ax.set_xlabel("step")
        _stages(ax, metrics)
    return figure


def training_plot(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """FVU, L0, dead slots and binding accuracy over steps, of training batches and of held-out rows."""
    figure, axes = new_figure(10.5, 5.6, 2, 2, sharex=True)
    panels = (
        ("fvu", "heldout/fvu", "FVU"),
        ("l0", "heldout/l0", "L0, active slots per row"),
        ("dead", "", "dead slots"),
        ("binding", "heldout/slot_accuracy", "binding accuracy"),
    )
    for ax, (key, held_out, name) in zip(axes, panels, strict=True):
        steps, values = _series(metrics, key)
        ax.plot(steps, values, color=BLUE, lw=1.2, label="training")
        if (found := _series(metrics, held_out))[0]:
            ax.plot(*found, color=ORANGE, lw=1.4, marker="o", ms=3, label="held out")
            ax.legend(fontsize=8, frameon=False)
        ax.set_ylabel(name)
        if key in ("fvu", "l0") and min(values, default=0) > 0:
            ax.set_yscale("log")
        if key == "binding":
            ax.set_ylim(-0.02, 1.02)
        _stages(ax, metrics)
    for ax in axes[2:]:
        ax.set_xlabel("step")
    return figure


def heldout_plot(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """How well concept slots tell their concepts on held-out rows, and how often they fire elsewhere, over steps; None
    where no evaluation says so."""
    panels: dict[str, dict[str, str]] = {
        "held-out rows, mean over concepts": {
            "auroc": "AUROC against other rows",
            "text_auroc": "AUROC against text",
            "average_precision": "average precision",
        },
        "held-out rows without a concept": {"text_firing": "a slot fires", "text_any_firing": "any slot fires"},
    }
    found = {
        title: {label: points for name, label in lines.items() if (points := _series(metrics, f"heldout/{name}"))[0]}
        for title, lines in panels.items()
    }
    found = {title: lines for title, lines in found.items() if lines}  # rows without a concept may not be there
    if not found:
        return None
    figure, axes = new_figure(5.25 * len(found), 3.6, len(found))
    for ax, (title, lines) in zip(axes, found.items(), strict=True):
        for (label, points), (colour, dash) in zip(lines.items(), STYLES, strict=False):
            ax.plot(*points, color=colour, ls=dash, marker="o", ms=3, label=label)
        ax.set(title=title, xlabel="step", ylim=(-0.02, 1.02))
        ax.legend(fontsize=8, frameon=False)
        steps = {step for points in lines.values() for step in points[0]}
        _stages(ax, [m for m in metrics if m["step"] in steps])
    return figure


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
    return [step for step, _ in points], [float(value) for _, value in points]


def _stages(ax: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """A vertical line where a stage begins, with its name at the top."""
    ax.grid(alpha=0.25)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    before = None
    for record in metrics:
        if record.get("stage") != before:
            if before is not None:
                ax.axvline(record["step"], color=GREY, lw=1, ls="--")
            ax.annotate(
                str(record["stage"]),
                (record["step"], 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -9),
                textcoords="offset points",
                fontsize=8,
                color=GREY,
            )
            before = record.get("stage")


def or_nan(value: float | None) -> float:
    """NaN for what is not known."""
    return float("nan") if value is None else value


def steering_plot(tokens: Sequence[str], slots: Mapping[str, tuple[Any, Any]], prompt: int, first: int = 0) -> Figure:
    """Activations of slots on the tokens of one text, and what they were changed to.

    slots: name -> (read, changed to), each as long as the tokens that were read. prompt: tokens of the prompt. first:
    tokens of padding in front, which are left out.
    """
    count = max(len(read) for read, _ in slots.values())
    places = np.arange(first, count)
    figure, axes = new_figure(max(4.0, 1.5 + 0.32 * len(places)), 1.2 + 1.5 * len(slots), rows=len(slots), sharex=True)
    for ax, (name, (read, changed)) in zip(axes, slots.items(), strict=True):
        ax.bar(places, read[first:], color=BLUE, label="read")
        steered = np.where(np.asarray(changed) != np.asarray(read), changed, np.nan)[first:]
        ax.plot(places, steered, "D", color=ORANGE, label="set to")
        ax.axvline(prompt - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        ax.set_ylabel(name)
    axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    # A dollar sign would begin mathematics.
    labels = [repr(token)[1:-1].replace("$", r"\$") for token in tokens[first:count]]
    axes[-1].set_xticks(places, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    return figure


def frontier_plot(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out FVU of the points at each trainer's chosen learning rate, means over seeds: over L0, one line per
    trainer, and over CPU seconds, one line per trainer and L0 through the shares of the steps that it was given."""
    figure, (left, right) = new_figure(11.0, 4.4, 2, sharey=True)
    shown = [point for point in points if point["chosen"] and point["heldout"]["fvu"]]
    trainers = list(dict.fromkeys(point["trainer"] for point in points))
    aims = sorted({point["aimed_l0"] for point in shown})

    def mean(same: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
        return tuple(np.mean([(p["heldout"]["l0"], p["heldout"]["fvu"], p["cpu_seconds"]) for p in same], axis=0))

    for trainer, (colour, dash), marker in zip(trainers, cycle(STYLES), cycle("os^vD")):
        mine = [point for point in shown if point["trainer"] == trainer]
        mine_at = {aim: [point for point in mine if point["aimed_l0"] == aim] for aim in aims}
        whole = sorted(mean([p for p in of if p["share"] == 1.0]) for of in mine_at.values() if of)
        l0, fvu = [one[0] for one in whole], [one[1] for one in whole]
        left.plot(l0, fvu, color=colour, linestyle=dash, marker=marker, label=trainer)
        for aim, of in mine_at.items():
            line = [mean([p for p in of if p["share"] == share]) for share in sorted({point["share"] for point in of})]
            right.plot([one[2] for one in line], [one[1] for one in line], color=colour, linestyle=dash, marker=marker)
            if line:
                right.annotate(f"L0 {aim}", (line[-1][2], line[-1][1]), fontsize=8)
    for ax, label in ((left, "mean active slots of a held-out row (L0)"), (right, "CPU seconds")):
        ax.set_xscale("log")
        ax.set_xlabel(label)
    left.set_ylabel("held-out FVU")
    left.legend(frameon=False, fontsize=9)
    return figure
