"""Plots and one self-contained HTML page for a run -> RUN/plots/*.png and RUN/report.html

  alignsae report --run runs/demo

Uses what is there: metrics.jsonl, config.yaml and outcome.json of the training, evaluation.json of `alignsae evaluate`,
swap.json of `alignsae swap`. It says in words what is odd about them, and links to the pages of `alignsae explore`
where they are in RUN/slot-pages. The files are attached to the run's MLflow run when it has one.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae report`."""
    parser.add_argument("--run", dest="run_dir", type=Path, required=True, help="run folder")
