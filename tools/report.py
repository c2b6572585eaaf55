"""Plots and one self-contained HTML page for a run -> RUN/plots/*.png and RUN/report.html

  alignsae report --run runs/demo

Uses what is there: metrics.jsonl and config.yaml of the training, evaluation.json of `alignsae evaluate`, swap.json of
`alignsae swap`. The files are attached to the run's MLflow run when it has one.
"""

import argparse
import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from tools import plots
from trainer.analysis.results import read_metrics, read_result, run_config
from trainer.files import write_result
from trainer.run_folder import RunFolder
from trainer.tracking import add_artifacts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae report`."""
    parser.add_argument("--run", dest="run_dir", type=Path, required=True, help="run folder")


def run(args: argparse.Namespace) -> None:
    """Draw, render, write."""
    folder = RunFolder(args.run_dir)
    metrics = read_metrics(args.run_dir)
    config = run_config(args.run_dir)
    evaluation, swap = _optional(folder.evaluation), _optional(folder.swap)
    figures = {"losses": plots.loss_plot(metrics), "training": plots.training_plot(metrics)} if metrics else {}
    if evaluation and evaluation["concepts"]:
        figures |= {"binding": plots.binding_plot(evaluation), "fragmentation": plots.fragmentation_plot(evaluation)}
    if swap:
        figures |= {"swap": plots.swap_plot(swap), "swap_matrix": plots.swap_matrix_plot(swap)}
    images = {name: _png(figure) for name, figure in figures.items()}
    written = []
    for name, image in images.items():
        written.append(folder.plots / f"{name}.png")
        write_result(written[-1], image)
    written.append(folder.report)
    page = render(folder.name, metrics, evaluation, swap, folder.config.read_text(), images)
    write_result(written[-1], page)
    tracked = add_artifacts(args.run_dir, config.tracking.uri, written)
    print(f"written: {written[-1]} and {len(images)} plots" + (", attached to the MLflow run" if tracked else ""))


def render(
    name: str,
    metrics: Sequence[Mapping[str, Any]],
    evaluation: dict[str, Any] | None,
    swap: dict[str, Any] | None,
    config: str,
    images: Mapping[str, bytes],
) -> str:
    """The page, with its images inside. Values are escaped: prompts may hold markup."""
    environment = Environment(loader=PackageLoader("tools"), autoescape=True, undefined=StrictUndefined)
    facts, spreads, splits, rows = [], [], [], []
    if metrics:
        last = metrics[-1]
        facts.append(f"{last['step']} steps, {last['rows']:,} rows, last stage {last['stage']}")
    if evaluation:
        facts.append(
            f"{evaluation['slots']:,} slots, {len(evaluation['concepts'])} concepts, width {evaluation['width']}"
        )
        facts.append(f"trained on {evaluation['trained_on'][:12]}")
        splits = [split for split in ("train", "heldout") if split in evaluation]
        evaluation = {"unsupervised": None, "loss_recovered": None, **evaluation}
    if evaluation and evaluation["concepts"]:
        spread = evaluation["train"]["fragmentation"]
        spreads = [("aligned, concept slots", spread["concept_slots"]), ("aligned, all slots", spread["all"])]
        if evaluation["unsupervised"]:
            spreads.append(("unsupervised, all slots", evaluation["unsupervised"]["train"]["fragmentation"]["all"]))
    if swap:
        rows = list(zip(swap["slots"]["alphas"], swap["mean_difference"]["alphas"], strict=True))
    return environment.get_template("report.html").render(
        name=name,
        facts=facts,
        evaluation=evaluation,
        splits=splits,
        spreads=spreads,
        swap=swap,
        swap_rows=rows,
        config=config,
        plots={key: base64.b64encode(image).decode() for key, image in images.items()},
    )


def _optional(path: Path) -> dict[str, Any] | None:
    return read_result(path, "write it again") if path.exists() else None


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
