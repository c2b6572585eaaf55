"""Train a grid of gates and sparsities, and see which gives the least FVU at an L0

  alignsae frontier --config configs/mine.yaml --validation data/mine/validation --heldout data/mine/heldout \\
      --out runs/frontier --l0 32 64 --lr 1e-3 3e-3 --peers-python .venv-peers/bin/python --peer-lr 3e-3

Every gate is trained at every L0 (relu by dictionary.target_l0) and every learning rate, on the rows, the number of
slots and the steps of the configuration. With --peers-python, the interpreter of an environment that has sae-lens and
eai-sparsify, these are trained beside them: the same rows in the same order, as many steps, the same warm-up and decay.
FVU and L0 are those of the held-out rows, `dead` the share of slots active on no row of the last epoch, CPU seconds
those of the whole process that trained. With --validation, the learning rate of each trainer at each L0 is the one
with the least FVU there (*), and the picture shows that one. The rate is chosen with the first of --seeds and all
steps; other seeds and --shares of the steps are trained at that rate alone. The second table compares trainers at equal
L0, on the line through the points of each, and says after how many CPU seconds ours are as good as a peer at its end.
The same command again goes on with the missing points.
"""

import argparse
import sys
from pathlib import Path

from tools.frontiers.points import OURS, PEERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae frontier`."""
    parser.add_argument("--config", required=True, help="YAML: data, number of slots, stages")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all points; may be repeated"
    )
    parser.add_argument("--heldout", required=True, metavar="SHARDS", help="rows to measure on")
    parser.add_argument("--validation", metavar="SHARDS", help="rows to choose each trainer's learning rate on")
    parser.add_argument("--out", required=True, type=Path, help="folder of the points, frontier.json and frontier.png")
    parser.add_argument("--gates", nargs="*", choices=OURS, default=list(OURS), help="default: all; none: peers alone")
    parser.add_argument("--l0", nargs="+", type=int, default=[32, 64], help="mean active slots of a row to aim at")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 3e-3], help="learning rates of ours")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="run.seed, and that of peers")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[], help="of the steps, at which ours are trained as well: 0.5 0.25"
    )
    parser.add_argument("--peers-python", default="", metavar="PYTHON", help="interpreter that has the peers")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument("--peer-lr", nargs="+", type=float, default=[3e-3], help="learning rates of peers")
    parser.add_argument(
        "--launcher", default=f"{sys.executable} -m", help="what stands before trainer.train (default: this python -m)"
    )
