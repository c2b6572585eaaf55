"""The figures of a reproduction beside the paper's: a table in Markdown, and where in the model the concepts live."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.plots import BLUE, GREEN, GREY, ORANGE

# arXiv 2512.02004, GPT-2 small: its best layer (6) where a row is of one layer.
PAPER = {
    "diagonal_accuracy": "1.00",
    "slot_accuracy": "0.912",
    "swap": "0.846",
    "category_kept_of_failures": "0.747",
    "efffeat_concept_slots": "1.809",
    "top1conc_concept_slots": "0.844",
    "efffeat_unsupervised": "586",
    "top1conc_unsupervised": "0.012",
}
ROWS = {
    "diagonal_accuracy": "diagonal accuracy",
    "slot_accuracy": "slot accuracy, held-out templates",
    "swap": "swaps that succeed",
    "category_kept_of_failures": "failed swaps that keep the category",
    "efffeat_concept_slots": "EffFeat, concept slots",
    "top1conc_concept_slots": "Top1Conc, concept slots",
    "efffeat": "EffFeat, all slots",
    "top1conc": "Top1Conc, all slots",
    "efffeat_unsupervised": "EffFeat, unsupervised",
    "top1conc_unsupervised": "Top1Conc, unsupervised",
    "mean_difference": "swaps by class-mean difference",
    "fvu": "FVU",
    "l0": "L0",
    "fvu_unsupervised": "FVU, unsupervised",
}


def markdown(found: Mapping[str, Any]) -> str:
    """Two tables, the reported layer beside the paper's and all layers, and what every stage took."""
    best = found["layers"][found["best_layer"]]
    lines = [
        f"Layer {found['best_layer']} and alpha {best['alpha']:g} were chosen by the swaps of the training templates;",
        "what follows is of held-out ones. "
        f"The language model answers {found['answer_accuracy']:.4f} of the questions.",
        "",
        "| measure | paper | here |",
        "|---|---|---|",
        *(f"| {name} | {PAPER.get(key, '-')} | {_shown(best, key)} |" for key, name in ROWS.items()),
        "",
        "| layer | diagonal | slot accuracy | alpha | swaps | mean difference | EffFeat, all | unsupervised | FVU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = ["diagonal_accuracy", "slot_accuracy", "alpha", "swap", "mean_difference"]
    columns += ["efffeat", "efffeat_unsupervised", "fvu"]
    for layer, row in found["layers"].items():
        lines.append(f"| {layer} | " + " | ".join(_shown(row, key) for key in columns) + " |")
    for what, key in (("swaps that succeed", "alphas"), ("failed ones that keep the category", "categories")):
        strengths = next(iter(found["layers"].values())).get(key)
        if strengths is None:  # results of an earlier version
            continue
        lines += ["", f"On training templates, {what}:", ""]
        lines += ["| layer, alpha | " + " | ".join(f"{float(a):g}" for a in strengths) + " |"]
        lines += ["|---" * (1 + len(strengths)) + "|"]
        for layer, row in found["layers"].items():
            shares = ("-" if share is None else f"{share:.3f}" for share in row[key].values())
            lines.append(f"| {layer} | " + " | ".join(shares) + " |")
    lines += ["", "| stage | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.0f} |" for name, seconds in found["seconds"].items()]
    return "\n".join(lines) + "\n"


def _shown(row: Mapping[str, Any], key: str) -> str:
    if row[key] is None:
        return "-"
    error = row.get(f"{key}_error")
    return f"{row[key]:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def horizon(found: Mapping[str, Any]) -> Figure:
    """Slot accuracy, swaps and fragmentation over the layers of the model."""
    layers = found["layers"]
    at = [int(layer) for layer in layers]
    figure = Figure(figsize=(11, 4), layout="constrained", dpi=130)
    shares, spread = figure.subplots(1, 2)
    for key, colour, mark in (
        ("diagonal_accuracy", GREY, "s"),
        ("slot_accuracy", BLUE, "o"),
        ("swap", GREEN, "^"),
        ("mean_difference", ORANGE, "v"),
    ):
        shares.plot(at, [row[key] for row in layers.values()], color=colour, marker=mark, label=ROWS[key])
    shares.set(xlabel="layer", ylabel="share", ylim=(-0.02, 1.05), title="Where the concepts live")
    shares.axvline(int(found["best_layer"]), color=GREY, linestyle=":", linewidth=1)
    shares.legend(frameon=False, fontsize=8)
    for key, colour, mark in (
        ("efffeat_concept_slots", BLUE, "o"),
        ("efffeat", GREEN, "^"),
        ("efffeat_unsupervised", ORANGE, "v"),
    ):
        spread.plot(at, [row[key] for row in layers.values()], color=colour, marker=mark, label=ROWS[key])
    spread.set(xlabel="layer", ylabel="slots a concept spreads over", yscale="log", title="Fragmentation")
    spread.legend(frameon=False, fontsize=8)
    for ax in (shares, spread):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
