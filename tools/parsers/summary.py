"""Collect a run's figures into RUN/summary.json, print them against their bars, and exit with 1 when one is missed.

  alignsae summary --run runs/demo --lm models/demo --unsupervised runs/demo-unsupervised \\
      --seconds-file runs/demo/seconds

Reads RUN/evaluation.json (`alignsae evaluate`), RUN/swap.json (`alignsae swap`) and LM/lm_report.json
(`alignsae finetune-lm`). Binding and fragmentation are those of the training templates; FVU and L0 are the worse of the
training and the held-out templates; swaps are those of swap.json.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae summary`."""
    parser.add_argument("--run", dest="run_dir", type=Path, required=True, help="run folder of the aligned dictionary")
    parser.add_argument("--lm", type=Path, required=True, help="folder of the language model, with lm_report.json")
    parser.add_argument("--unsupervised", type=Path, required=True, help="run that evaluation.json must compare with")
    parser.add_argument("--seconds-file", type=Path, required=True, help="file that holds the wall time in seconds")
    parser.add_argument(
        "--bars",
        type=Path,
        default=Path("configs/demo_bars.yaml"),
        help="rows and bars (default: configs/demo_bars.yaml)",
    )
