"""Train a grid of configurations, one after the other, and tabulate where each ended.

  alignsae sweep --config configs/demo.yaml --out runs/sweep \\
      --grid loss.sp=0.02,0.05,0.1 --grid dictionary.free_slots=4096,16384

Each point is an ordinary run in OUT/NAME, started with --launcher; the same command again goes on with the points that
did not finish. The last logged figures of all points go to OUT/sweep.json and to the terminal.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae sweep`."""
    parser.add_argument("--config", required=True, help="YAML of the points' common settings")
    parser.add_argument(
        "--grid", action="append", required=True, metavar="KEY=V1,V2", help="a setting and its values; may be repeated"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all points; may be repeated"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument(
        "--launcher", default="accelerate launch -m", help="what stands before trainer.train (default: %(default)s)"
    )
