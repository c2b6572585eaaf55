"""Arguments that several subcommands have."""

import argparse
from pathlib import Path
from typing import Any

MATCH = ("exact", "prefix", "first")  # keys of trainer.language_model.matching.RULES
STORED = ("float16", "float32", "bfloat16")  # of trainer.stream.manifest.STORED_DTYPES


def add_device(parser: argparse.ArgumentParser | Any, what: str) -> None:
    """--device; None, which the command line sets to CUDA where there is one, else to the CPU."""
    parser.add_argument("--device", help=f"device of {what} (default: cuda where there is one, else cpu)")


def add_run(parser: argparse.ArgumentParser) -> None:
    """--run: the run folder whose dictionary is read."""
    parser.add_argument(
        "--run",
        dest="run_dir",
        type=Path,
        required=True,
        help="run folder (its newest checkpoint is read), or RUN/checkpoints/best",
    )
