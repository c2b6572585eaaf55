"""Go through a published experiment, from its data to its tables.

  alignsae reproduce paper --scale cpu --out runs/paper
  alignsae reproduce paper --scale cpu --out runs/paper --list

`paper` is arXiv 2512.02004: invented persons, a language model that knows them, and at every layer a dictionary with
concept slots beside an unsupervised one of the same size. --scale paper has its sizes (a GPU, or days), cpu the same
with a narrower language model (hours on two cores), sweep a narrow one in fp32 and 8,192 slots, so that a CPU goes
through all layers, tiny shows within minutes that all of it runs.

Every stage is an `alignsae` command, which --list prints. OUT/stages.json keeps which are done: the same command goes
on after an interruption, and a stage that can goes on within itself. At the end OUT receives results.md, results.json
and results.png.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae reproduce`."""
    parser.add_argument("experiment", choices=("paper",), help="which experiment")
    parser.add_argument(
        "--scale", choices=("paper", "cpu", "sweep", "tiny"), default="cpu", help="sizes (default: %(default)s)"
    )
    parser.add_argument("--layers", default="all", help="block indices, 0,5,6, or `all` (default: all)")
    parser.add_argument("--config", type=Path, help="of the dictionaries (default: configs/paper.yaml)")
    parser.add_argument("--launch", metavar="NAME", help="launch file, as `alignsae train` takes it")
    parser.add_argument("--list", action="store_true", help="print the commands and which are done, run nothing")
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is made")
