"""Train a grid of gates and sparsities, and see which gives the least FVU at an L0

  alignsae frontier --config configs/mine.yaml --validation data/mine/validation --heldout data/mine/heldout \\
      --out runs/frontier --l0 32 64 --lr 1e-3 3e-3 --peers-python .venv-peers/bin/python --peer-lr 3e-3

Every gate is trained at every L0 (relu by dictionary.target_l0) and every learning rate, on the rows, the number of
slots and the steps of the configuration. With --peers-python, the interpreter of an environment that has sae-lens and
eai-sparsify, these are trained beside them: the same rows in the same order, as many steps, the same warm-up and decay.
FVU and L0 are those of the held-out rows, `dead` the share of slots active on no row of the last epoch, CPU seconds
those of the whole process that trained. With --validation, the learning rate of each trainer at each L0 is the one
with the least FVU there (*), and the picture shows that one. The same command again goes on with the missing points.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.frontiers.points import OURS, PEERS, Point, choose, record, table
from tools.frontiers.training import Setting, train
from tools.plots import frontier_plot
from trainer.analysis.results import read_result
from trainer.config import flatten
from trainer.errors import UserError
from trainer.files import write_result
from trainer.stream import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae frontier`."""
    parser.add_argument("--config", required=True, help="YAML: data, number of slots, stages")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all points; may be repeated"
    )
    parser.add_argument("--heldout", required=True, metavar="SHARDS", help="rows to measure on")
    parser.add_argument("--validation", metavar="SHARDS", help="rows to choose each trainer's learning rate on")
    parser.add_argument("--out", required=True, type=Path, help="folder of the points, frontier.json and frontier.png")
    parser.add_argument("--gates", nargs="+", choices=OURS, default=list(OURS), help="default: all")
    parser.add_argument("--l0", nargs="+", type=int, default=[32, 64], help="mean active slots of a row to aim at")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 3e-3], help="learning rates of ours")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="run.seed, and that of peers")
    parser.add_argument("--peers-python", default="", metavar="PYTHON", help="interpreter that has the peers")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument("--peer-lr", nargs="+", type=float, default=[3e-3], help="learning rates of peers")
    parser.add_argument(
        "--launcher", default=f"{sys.executable} -m", help="what stands before trainer.train (default: this python -m)"
    )


def run(args: argparse.Namespace) -> None:
    """Train what is missing, write the JSON, the picture and the table."""
    splits = {"heldout": args.heldout} | ({"validation": args.validation} if args.validation else {})
    setting = Setting(args.config, args.set, args.launcher, splits, args.peers_python)
    points = [Point(*chosen) for chosen in product(args.gates, args.l0, args.lr, args.seeds)]
    if args.peers_python:
        points += [Point(*chosen) for chosen in product(args.peers, args.l0, args.peer_lr, args.seeds)]
    made_with = [facts(point, setting) for point in points]  # better refused before the first than after hours
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    for point, made in tqdm(list(zip(points, made_with, strict=True)), desc="frontier", unit="point"):
        kept = args.out / point.name / "point.json"
        if not kept.exists():
            write_result(kept, {"made_with": made, "found": record(point, train(point, setting, kept.parent))})
        result = read_result(kept, "delete it, and it is trained again")
        if result.get("made_with") != made:
            raise UserError(f"{kept} was made with other settings or data; choose another --out, or delete it")
        found.append(result["found"])
    choose(found)
    write_result(args.out / "frontier.json", {"points": found})
    picture = args.out / "frontier.png"
    frontier_plot(found).savefig(picture)
    print(table(found))
    print(f"written: {args.out / 'frontier.json'}, {picture}")


def facts(point: Point, setting: Setting) -> dict[str, Any]:
    """What the figures of a point depend on, as JSON keeps it. Raises UserError for a point that cannot be trained or
    measured."""
    inputs = setting.inputs(point)
    config = {
        key: value for key, value in flatten(inputs.config).items() if not key.startswith(("run.dir", "tracking"))
    }
    splits = {}
    for name, folder in setting.splits.items():
        manifest = Manifest.load(folder)
        if manifest.width != inputs.manifest.width:
            raise UserError(
                f"--{name} {folder} has rows of width {manifest.width}, data.shards of {inputs.manifest.width}"
            )
        splits[name] = manifest.digest
    return json.loads(json.dumps({"config": config, "data": inputs.manifest.digest, **splits}))
