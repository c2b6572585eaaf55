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
from trainer.losses import TERMS

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#555555"
LABELLED = 24  # concepts up to which every one is named and every cell is written out
STYLES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":"), (PURPLE, (0, (5, 1, 1, 1, 1, 1)))]


def _figure(width: float, height: float, columns: int = 1, rows: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    axes = np.atleast_1d(figure.subplots(rows, columns, **kwargs)).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _side(names: Sequence[str]) -> float:
    """Inches of a matrix with these rows: room for every cell's number while there are numbers."""
    return 1.9 + 0.52 * len(names) if len(names) <= LABELLED else 6.5


def _matrix(ax: Axes, share: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Any:
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
    side = _side(names)
    figure, axes = _figure(side * len(splits) + 1, side, len(splits), sharey=True)
    for ax, split in zip(axes, splits, strict=True):
        bound = evaluation[split]["binding"]
        counts = restored(bound["confusion"], len(names)).numpy()
        total = counts.sum(axis=1, keepdims=True)
        share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
        image = _matrix(ax, share, names, [*names, "none active"])
        title = {"train": "training templates", "heldout": "held-out templates"}[split]
        ax.set_title(f"{title}: diagonal {bound['diagonal_accuracy']:.3f}", fontsize=10)
        ax.set_xlabel("strongest concept slot")
    axes[0].set_ylabel("true concept")
    figure.colorbar(image, ax=axes, label="share of the concept's rows", shrink=0.85)
    return figure


def swap_plot(swap: Mapping[str, Any]) -> Figure:
    """Success and kept category over alpha, for the slots and for the mean difference."""
    figure, (ax,) = _figure(6.6, 4.2)
    for method, name, colour, marker in (
        ("slots", "concept slots", BLUE, "o"),
        ("mean_difference", "mean difference (no dictionary)", RED, "s"),
    ):
        points = sorted(swap[method]["alphas"], key=lambda point: point["alpha"])
        alphas = [p["alpha"] for p in points]
        ax.plot(alphas, [p["success"] for p in points], color=colour, marker=marker, label=f"{name}: success")
        kept = [p["category_kept"] for p in points]
        ax.plot(alphas, kept, color=colour, marker=marker, ms=3, lw=1, ls="--", label=f"{name}: category kept")
    if min(alphas) > 0:
        ax.set_xscale("log", base=2)
        ax.set_xticks(alphas, [f"{a:g}" for a in alphas])
        ax.minorticks_off()
    ax.set(ylim=(-0.02, 1.02), xlabel="strength alpha", ylabel="share of swaps")
    chosen_on = swap.get("validation", {"pairs": swap["pairs"], "on": f"{swap['split']} prompts"})
    ax.set_title(f"{chosen_on['pairs']} swaps of {chosen_on['on']}, layer {swap['layer']}", fontsize=10)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    return figure


def swap_matrix_plot(swap: Mapping[str, Any]) -> Figure:
    """Success per ordered relation pair, each method at its best alpha."""
    names = swap["concepts"]
    side = _side(names)
    figure, axes = _figure(side * 2 + 1, side, 2, sharey=True)
    for ax, (method, name) in zip(axes, (("slots", "slots"), ("mean_difference", "mean difference")), strict=True):
        tried = np.array(swap[method]["matrix"]["swaps"], dtype=float)
        won = np.array(swap[method]["matrix"]["successes"], dtype=float)
        share = np.divide(won, tried, out=np.full_like(won, np.nan), where=tried > 0)
        image = _matrix(ax, share, names, names)
        best = swap[method]
        ax.set_title(f"{name}, alpha {best['best_alpha']:g}: {best['best_success']:.3f}", fontsize=10)
        ax.set_xlabel("target relation")
    axes[0].set_ylabel("asked relation")
    figure.colorbar(image, ax=axes, label="share of swaps that succeed", shrink=0.85)
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
    figure, (ax,) = _figure(max(8.5, 3.2 + 0.85 * len(names)) if len(names) <= LABELLED else 8.5, 4.2)
    values = [[_nan(part["per_concept"][n]["efffeat"]) for n in names] for _, part, _, _ in series]
    labels = [f"{name} (mean {_nan(part['efffeat']):.3g})" for name, part, _, _ in series]
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


def loss_plot(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """The loss and its terms (unweighted) over steps, one panel each for the total and the terms."""
    figure, (left, right) = _figure(10.5, 3.9, 2)
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
    """FVU, L0, dead slots and binding accuracy over steps."""
    figure, axes = _figure(10.5, 5.6, 2, 2, sharex=True)
    panels = (
        ("fvu", "FVU"),
        ("l0", "L0, active slots per row"),
        ("dead", "dead slots"),
        ("binding", "binding accuracy"),
    )
    for ax, (key, name) in zip(axes, panels, strict=True):
        steps, values = _series(metrics, key)
        ax.plot(steps, values, color=BLUE, lw=1.2)
        ax.set_ylabel(name)
        if key in ("fvu", "l0") and min(values, default=0) > 0:
            ax.set_yscale("log")
        if key == "binding":
            ax.set_ylim(-0.02, 1.02)
        _stages(ax, metrics)
    for ax in axes[2:]:
        ax.set_xlabel("step")
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


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def steering_plot(tokens: Sequence[str], slots: Mapping[str, tuple[Any, Any]], prompt: int, first: int = 0) -> Figure:
    """Activations of slots on the tokens of one text, and what they were changed to.

    slots: name -> (read, changed to), each as long as the tokens that were read. prompt: tokens of the prompt. first:
    tokens of padding in front, which are left out.
    """
    count = max(len(read) for read, _ in slots.values())
    places = np.arange(first, count)
    figure, axes = _figure(max(4.0, 1.5 + 0.32 * len(places)), 1.2 + 1.5 * len(slots), rows=len(slots), sharex=True)
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
    """Held-out FVU over L0, one line per trainer through the points at its chosen learning rate."""
    figure, (ax,) = _figure(6.6, 4.4)
    trainers = list(dict.fromkeys(point["trainer"] for point in points))
    for trainer, (colour, dash), marker in zip(trainers, cycle(STYLES), cycle("os^vD")):
        chosen = [p["heldout"] for p in points if p["trainer"] == trainer and p["chosen"] and p["heldout"]["fvu"]]
        chosen.sort(key=lambda measured: measured["l0"])
        l0, fvu = [measured["l0"] for measured in chosen], [measured["fvu"] for measured in chosen]
        ax.plot(l0, fvu, color=colour, linestyle=dash, marker=marker, label=trainer)
    ax.set_xscale("log")
    ax.set_xlabel("mean active slots of a held-out row (L0)")
    ax.set_ylabel("held-out FVU")
    ax.legend(frameon=False, fontsize=9)
    return figure
