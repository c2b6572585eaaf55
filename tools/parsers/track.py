"""Bring MLflow level with the metrics.jsonl of runs, whatever was missed while its server was away

  alignsae track runs/demo
  alignsae track runs/sweep/* --uri http://127.0.0.1:5000

The store is asked which steps it has and gets the others, then the status that outcome.json says and the files of the
run folder; done twice it adds nothing. A run that was trained with tracking.uri=off is entered into the store of --uri.
A store's credentials are kept nowhere: give them in --uri, in MLFLOW_TRACKING_URI, or in MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae track`."""
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--uri", help="MLflow store (default: the one that the run was tracked in)")
