"""Give a trained relu dictionary a threshold and one gain, without training

  alignsae gate runs/mine --l0 32 --rows data/mine/train --heldout data/mine/heldout --out gated/mine

The threshold is the one above which --l0 entries a row lie on average, in units in which decoder rows have norm 1; the
gain of all codes is then the one with the least squared error. Both are taken from up to 8,192 rows of --rows. What is
written is a folder as `alignsae import` writes it, with the gate batch_topk: dictionary.start_from and `load` read it.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae gate`."""
    parser.add_argument("source", metavar="RUN", help="run, checkpoint or any other dictionary that `import` reads")
    parser.add_argument("--l0", type=int, required=True, help="mean active slots of a row")
    parser.add_argument("--rows", metavar="SHARDS", required=True, help="rows to fit on")
    parser.add_argument("--heldout", metavar="SHARDS", help="rows to measure on as well")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
