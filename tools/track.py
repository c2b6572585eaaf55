"""What `alignsae track` does; its arguments and its help are in tools/parsers."""

import argparse

from trainer.tracking import fill_in


def run(args: argparse.Namespace) -> None:
    """Fill in, run by run."""
    for run_dir in args.run_dirs:
        filled = fill_in(run_dir, args.uri)
        status = filled.status or "no outcome.json, status as it was"
        print(f"{run_dir}: {filled.numbers} numbers added to MLflow run {filled.run_id} ({status})")
