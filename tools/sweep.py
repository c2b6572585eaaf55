"""What `alignsae sweep` does; its arguments and its help are in tools/parsers."""

import argparse
import itertools
import shlex
import subprocess
from typing import Any

from tqdm import tqdm

from trainer.analysis.results import read_metrics
from trainer.config import load_config
from trainer.errors import UserError
from trainer.files import write_result
from trainer.inputs import read_inputs
from trainer.run_folder import RunFolder
from trainer.tracking import open_parent

COLUMNS = ("loss", "fvu", "l0", "dead", "binding", "rows_per_s")


def run(args: argparse.Namespace) -> int:
    """Train all points; 1 when some failed."""
    axes = [parse_axis(axis) for axis in args.grid]
    points = [list(point) for point in itertools.product(*axes)]
    refuse_impossible(args.config, args.set, points)
    args.out.mkdir(parents=True, exist_ok=True)
    tracking = load_config(args.config, [*args.set, *points[0]]).tracking
    with open_parent(args.out, tracking, {"config": args.config, "set": args.set, "grid": args.grid}) as parent:
        rows = []
        for point in tqdm(points, desc="sweep", unit="run"):
            rows.append(trained(args, [*point, *parent.settings], ",".join(point).replace("/", "_")))
            write_result(args.out / "sweep.json", {"points": rows})
        parent.artifact(args.out / "sweep.json")
        failed = [row["run"] for row in rows if row["exit"]]
        parent.status = "FAILED" if failed else "FINISHED"
    print(table(rows))
    if failed:
        print(f"{len(failed)} of {len(rows)} runs failed; see {args.out}/{failed[0]}/train.log")
    return 1 if failed else 0


def trained(args: argparse.Namespace, settings: list[str], name: str) -> dict[str, Any]:
    """Train a point in OUT/name; its exit code and the last of its figures."""
    folder = args.out / name
    folder.mkdir(exist_ok=True)
    command = [*shlex.split(args.launcher), "trainer.train", "--config", args.config, *args.set, *settings]
    with (folder / "train.log").open("a") as log:
        run = [*command, f"run.dir={folder}"]
        code = subprocess.run(run, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    metrics = read_metrics(folder) if RunFolder(folder).metrics.exists() else []
    return {"run": name, "exit": code, **{key: metrics[-1].get(key) if metrics else None for key in COLUMNS}}


def refuse_impossible(config: str, common: list[str], points: list[list[str]]) -> None:
    """Raise UserError with what is wrong with any of the points: better found before the first than after hours of
    training."""
    wrong: dict[str, list[str]] = {}
    for point in points:
        try:
            read_inputs(load_config(config, [*common, *point]))
        except UserError as error:
            wrong.setdefault(str(error), []).append(",".join(point))
    if wrong:
        reasons = "; ".join(
            f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {e}" for e, names in wrong.items()
        )
        raise UserError(f"{sum(map(len, wrong.values()))} of {len(points)} points cannot be trained: {reasons}")


def parse_axis(text: str) -> list[str]:
    """`key=a,b` -> [`key=a`, `key=b`]. Raises UserError for anything else."""
    key, separator, values = text.partition("=")
    if not separator or not key or not all(values.split(",")):
        raise UserError(f"--grid {text!r} is not KEY=V1,V2,...")
    return [f"{key}={value}" for value in values.split(",")]


def table(rows: list[dict]) -> str:
    """The figures as aligned text."""
    width = max(len(row["run"]) for row in rows)
    lines = [f"{'run':<{width}}" + "".join(f"{name:>12}" for name in COLUMNS)]
    for row in rows:
        figures = ("-" if row[name] is None else f"{row[name]:.4g}" for name in COLUMNS)
        lines.append(f"{row['run']:<{width}}" + "".join(f"{figure:>12}" for figure in figures))
    return "\n".join(lines)
