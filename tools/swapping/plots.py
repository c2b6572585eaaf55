"""Figures of swap.json: each function takes it parsed and returns a matplotlib figure."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tools.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, draw_matrix, matrix_side, new_figure, or_nan
from tools.swapping.table import FORMS, methods_of

SHARES = (("success", "success"), ("isolation", "isolation"), ("quiet", "quiet on the side"), ("joint", "joint score"))


def swap_plot(swap: Mapping[str, Any]) -> Figure:
    """Success over alpha for every method, and the kept category for the slots and the mean difference."""
    figure, (ax,) = new_figure(6.6, 4.4)
    looks = zip(cycle((BLUE, RED, GREEN, ORANGE, PURPLE, GREY)), cycle("osD^vP"))
    for (method, part), (colour, marker) in zip(methods_of(swap).items(), looks, strict=False):
        points = sorted(part["alphas"], key=lambda point: point["alpha"])
        tried = [p["alpha"] for p in points]
        ax.plot(tried, [p["success"] for p in points], color=colour, marker=marker, label=f"{_spoken(method)}: success")
        if method in ("slots", "mean_difference"):
            kept, label = [p["category_kept"] for p in points], f"{_spoken(method)}: category kept"
            ax.plot(tried, kept, color=colour, marker=marker, ms=3, lw=1, ls="--", label=label)
    alphas = sorted({point["alpha"] for part in methods_of(swap).values() for point in part["alphas"]})
    if alphas[0] > 0:
        ax.set_xscale("log", base=2)
        ax.set_xticks(alphas, [f"{a:g}" for a in alphas])
        ax.minorticks_off()
    ax.set(ylim=(-0.02, 1.02), xlabel="strength alpha", ylabel="share of swaps")
    chosen_on = swap.get("validation", {"pairs": swap["pairs"], "on": f"{swap['split']} prompts"})
    ax.set_title(f"{chosen_on['pairs']} swaps of {chosen_on['on']}, layer {swap['layer']}", fontsize=10)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    return figure


def swap_forms_plot(swap: Mapping[str, Any]) -> Figure:
    """Success, isolation, quiet and joint score of every method, always and where the source is read."""
    methods = methods_of(swap)
    figure, axes = new_figure(10.5, 1.6 + 0.42 * len(methods), len(FORMS), sharey=True)
    places = np.arange(len(methods))
    for ax, (which, what) in zip(axes, FORMS.items(), strict=True):
        forms = [part["forms"][which] for part in methods.values()]
        for (key, name), marker, colour in zip(SHARES, "o^vD", (BLUE, GREEN, ORANGE, "black"), strict=True):
            errors = [
                or_nan(form.get({"joint": "joint_standard_error", "success": "standard_error"}.get(key)))
                for form in forms
            ]
            values = [or_nan(form[key]) for form in forms]
            ax.errorbar(values, places, xerr=errors, color=colour, marker=marker, ls="none", label=name, alpha=0.85)
        ax.set(xlim=(-0.02, 1.02), xlabel="share", title=f"edited {what}")
        ax.set_yticks(places, [_spoken(name) for name in methods])
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _spoken(method: str) -> str:
    return {"slots": "concept slots", "mean_difference": "mean difference"}.get(method, method)


def swap_matrix_plot(swap: Mapping[str, Any]) -> Figure:
    """Success per ordered relation pair, each method at its best alpha."""
    names = swap["concepts"]
    side = matrix_side(names)
    figure, axes = new_figure(side * 2 + 1, side, 2, sharey=True)
    for ax, (method, name) in zip(axes, (("slots", "slots"), ("mean_difference", "mean difference")), strict=True):
        tried = np.array(swap[method]["matrix"]["swaps"], dtype=float)
        won = np.array(swap[method]["matrix"]["successes"], dtype=float)
        share = np.divide(won, tried, out=np.full_like(won, np.nan), where=tried > 0)
        image = draw_matrix(ax, share, names, names)
        best = swap[method]
        ax.set_title(f"{name}, alpha {best['best_alpha']:g}: {best['best_success']:.3f}", fontsize=10)
        ax.set_xlabel("target relation")
    axes[0].set_ylabel("asked relation")
    figure.colorbar(image, ax=axes, label="share of swaps that succeed", shrink=0.85)
    return figure
