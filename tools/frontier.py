"""What `alignsae frontier` does; its arguments and its help are in tools/parsers."""

import argparse
import statistics
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.frontiers.points import OURS, Point, choose, compared, comparison, record, table
from tools.frontiers.training import Setting, made_with, train
from tools.plots import frontier_plot
from trainer.analysis.results import read_result
from trainer.config import load_config
from trainer.errors import UserError
from trainer.files import write_result
from trainer.tracking import Parent, open_parent


def run(args: argparse.Namespace) -> None:
    """Train what is missing, write the JSON, the picture and the table."""
    if not all(0 < share <= 1 for share in args.shares):
        raise UserError(f"--shares {args.shares} must be above 0, at most 1")
    splits = {"heldout": args.heldout} | ({"validation": args.validation} if args.validation else {})
    setting = Setting(args.config, args.set, args.launcher, splits, args.peers_python)
    where = [*product(args.gates, args.l0, args.lr)]
    if args.peers_python:
        where += product(args.peers, args.l0, args.peer_lr)
    args.shares = sorted({1.0, *args.shares}, reverse=True)
    first = args.seeds[0]
    points = [Point(*place, first, share) for place in where for share in _shares(place[0], args.shares)]
    for point in points:  # better refused before the first than after hours
        made_with(point, setting)
    args.out.mkdir(parents=True, exist_ok=True)
    tracking = load_config(args.config, setting.overrides(points[0])).tracking
    common = {"config": args.config, "set": args.set, "l0": args.l0, "seeds": args.seeds}
    with open_parent(args.out, tracking, common) as parent:
        setting.tracked = parent.settings
        found = grid(args, setting, points, parent)
        rows = compared(found)
        write_result(args.out / "frontier.json", {"points": found, "compared": rows})
        picture = args.out / "frontier.png"
        frontier_plot(found).savefig(picture)
        when = max(path.stat().st_mtime for path in args.out.glob("*/point.json"))
        for row in rows:
            # Over the L0 in place of the step, the curve of a trainer is its frontier.
            name = row["trainer"] if row["share"] == 1.0 else f"{row['trainer']}_share_{row['share']:g}"
            parent.add({f"frontier/fvu/{name}": statistics.fmean(row["fvu"])}, row["aimed_l0"], when)
        parent.artifact(args.out / "frontier.json")
        parent.artifact(picture)
    print(f"{table(found)}\n\n{comparison(rows)}")
    print(f"written: {args.out / 'frontier.json'}, {picture}")


def grid(args: argparse.Namespace, setting: Setting, points: list[Point], parent: Parent) -> list[dict[str, Any]]:
    """Records of the points, with `chosen`, and of the chosen ones at other seeds and shares."""
    _, *others = args.seeds

    def all_of(points: list[Point], what: str) -> list[dict[str, Any]]:
        return [_found(point, setting, args.out, parent) for point in tqdm(points, f"frontier: {what}", unit="point")]

    found = all_of([point for point in points if point.share == 1.0], "learning rates")
    choose(found)
    chosen = [(one["trainer"], one["aimed_l0"], one["lr"]) for one in found if one["chosen"]]
    more = [
        Point(trainer, l0, lr, seed, share)
        for (trainer, l0, lr), seed in product(chosen, args.seeds)
        for share in _shares(trainer, args.shares)
        if seed in others or share < 1.0
    ]
    return found + [one | {"chosen": True} for one in all_of(more, "seeds and shares")]


def _shares(trainer: str, shares: list[float]) -> list[float]:
    """Peers take all steps."""
    return shares if trainer in OURS else [1.0]


def _found(point: Point, setting: Setting, out: Path, parent: Parent) -> dict[str, Any]:
    """The record of a point, trained unless it is there; of one of ours its figures are numbers of its run, too."""
    made, kept = made_with(point, setting), out / point.name / "point.json"
    if not kept.exists():
        write_result(kept, {"made_with": made, "found": record(point, train(point, setting, kept.parent))})
    result = read_result(kept, "delete it, and it is trained again")
    if result.get("made_with") != made:
        raise UserError(f"{kept} was made with other settings or data; choose another --out, or delete it")
    found = result["found"]
    values = {f"frontier/{key}": found[key] for key in ("dead", "cpu_seconds")}
    for split in setting.splits:
        values |= {f"frontier/{split}_{key}": found[split][key] for key in ("fvu", "l0")}
    numbers = {key: value for key, value in values.items() if value is not None}
    parent.add_to(kept.parent / "run", numbers, kept.stat().st_mtime)
    return found
