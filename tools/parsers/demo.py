"""The whole result in small, in this folder -> data/demo, models/demo, runs/demo

  alignsae demo

About ten minutes on two CPU cores: invented persons, a small language model that knows them, its activations, a
dictionary with concept slots and one without, evaluation, swaps, report, and its figures beside their bars. It is
configs/demo.sh, whose commands can be run one by one.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae demo`."""
    parser.add_argument("--again", action="store_true", help="remove what an earlier demo left here")
