"""What `alignsae report` does; its arguments and its help are in tools/parsers."""

import argparse
import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from tools import plots
from tools.reporting.oddities import oddities
from tools.swapping import plots as swap_plots
from tools.swapping import table
from trainer.analysis.results import read_metrics, read_result, run_config
from trainer.files import write_result
from trainer.run_folder import RunFolder
from trainer.tracking import add_artifacts


def run(args: argparse.Namespace) -> None:
    """Draw, render, write."""
    folder = RunFolder.around(args.run_dir)
    metrics = read_metrics(folder.path)
    config = run_config(folder.path)
    evaluation, swap, outcome = (_optional(path) for path in (folder.evaluation, folder.swap, folder.outcome))
    figures = {"losses": plots.loss_plot(metrics), "training": plots.training_plot(metrics)} if metrics else {}
    if heldout := plots.heldout_plot(metrics):
        figures["heldout"] = heldout
    if evaluation and "density" in evaluation["train"]["reconstruction"]:
        figures["density"] = plots.density_plot(evaluation)
    if evaluation and evaluation["concepts"]:
        figures |= {"binding": plots.binding_plot(evaluation), "fragmentation": plots.fragmentation_plot(evaluation)}
    if swap:
        figures |= {"swap": swap_plots.swap_plot(swap), "swap_matrix": swap_plots.swap_matrix_plot(swap)}
        if "forms" in swap["slots"]:
            figures["swap_forms"] = swap_plots.swap_forms_plot(swap)
    images = {name: _png(figure) for name, figure in figures.items()}
    written = []
    for name, image in images.items():
        written.append(folder.plots / f"{name}.png")
        write_result(written[-1], image)
    written.append(folder.report)
    odd = oddities(metrics, evaluation, outcome)
    write_result(written[-1], render(folder, metrics, evaluation, swap, odd, images))
    tracked = add_artifacts(folder.path, config.tracking.uri, written)
    for sentence in odd:
        print(f"odd: {sentence}")
    print(f"written: {written[-1]} and {len(images)} plots" + (", attached to the MLflow run" if tracked else ""))


def render(
    folder: RunFolder,
    metrics: Sequence[Mapping[str, Any]],
    evaluation: dict[str, Any] | None,
    swap: dict[str, Any] | None,
    odd: Sequence[str],
    images: Mapping[str, bytes],
) -> str:
    """The page, with its images inside. Values are escaped: prompts may hold markup."""
    environment = Environment(
        loader=PackageLoader("tools"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    facts, spreads, splits, rows = [], [], [], []
    if metrics:
        last = metrics[-1]
        facts += [f"{last['step']} steps", f"{last['rows']:,} rows", f"last stage {last['stage']}"]
    if evaluation:
        facts += [f"{evaluation['slots']:,} slots", f"{len(evaluation['concepts'])} concepts"]
        facts += [f"width {evaluation['width']}", f"trained on {evaluation['trained_on'][:12]}"]
        splits = [split for split in ("train", "heldout") if split in evaluation]
        evaluation = {"unsupervised": None, "loss_recovered": None, "text_loss_recovered": None, **evaluation}
    if evaluation and evaluation["concepts"]:
        spread = evaluation["train"]["fragmentation"]
        spreads = [("aligned, concept slots", spread["concept_slots"]), ("aligned, all slots", spread["all"])]
        if evaluation["unsupervised"]:
            spreads.append(("unsupervised, all slots", evaluation["unsupervised"]["train"]["fragmentation"]["all"]))
    if swap:
        rows = list(zip(swap["slots"]["alphas"], swap["mean_difference"]["alphas"], strict=True))
    pages = folder.slot_pages / "index.html"
    return environment.get_template("report.html").render(
        name=folder.name,
        facts=facts,
        odd=odd,
        evaluation=evaluation,
        splits=splits,
        spreads=spreads,
        swap=swap,
        swap_rows=rows,
        swap_forms=[table.COLUMNS, *table.cells(swap)] if swap and "forms" in swap["slots"] else [],
        config=folder.config.read_text(encoding="utf-8"),
        plots={key: base64.b64encode(image).decode() for key, image in images.items()},
        slots=pages.relative_to(folder.path).as_posix() if pages.is_file() else "",
    )


def _optional(path: Path) -> dict[str, Any] | None:
    return read_result(path, "write it again") if path.exists() else None


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
