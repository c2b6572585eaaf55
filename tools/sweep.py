"""Train a grid of configurations, one after the other, and tabulate where each ended.

  alignsae sweep --config configs/demo.yaml --out runs/sweep \\
      --grid loss.sp=0.02,0.05,0.1 --grid dictionary.free_slots=4096,16384

Each point is an ordinary run in OUT/NAME, started with --launcher; the same command again goes on with the points that
did not finish. The last logged figures of all points go to OUT/sweep.json and to the terminal.
"""

import argparse
import itertools
import shlex
import subprocess
from pathlib import Path

from tqdm import tqdm

from trainer.analysis.results import read_metrics
from trainer.config import load_config
from trainer.errors import UserError
from trainer.files import write_result
from trainer.inputs import read_inputs
from trainer.run_folder import RunFolder
from trainer.tracking import open_parent

COLUMNS = ("loss", "fvu", "l0", "dead", "binding", "rows_per_s")


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


def run(args: argparse.Namespace) -> int:
    """Train all points; 1 when some failed."""
    axes = [parse_axis(axis) for axis in args.grid]
    points = [list(point) for point in itertools.product(*axes)]
    refuse_impossible(args.config, args.set, points)
    args.out.mkdir(parents=True, exist_ok=True)
    tracking = load_config(args.config, [*args.set, *points[0]]).tracking
    parent = open_parent(args.out, tracking, {"config": args.config, "set": args.set, "grid": args.grid})
    part_of = [f"tracking.parent={parent.run_id}"] if parent else []
    rows = []
    for point in tqdm(points, desc="sweep", unit="run"):
        folder = args.out / ",".join(setting.replace("/", "_") for setting in point)
        folder.mkdir(exist_ok=True)
        command = [
            *shlex.split(args.launcher),
            "trainer.train",
            "--config",
            args.config,
            *args.set,
            *point,
            *part_of,
            f"run.dir={folder}",
        ]
        with (folder / "train.log").open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        metrics = read_metrics(folder) if RunFolder(folder).metrics.exists() else []
        rows.append(
            {"run": folder.name, "exit": code, **{name: metrics[-1].get(name) if metrics else None for name in COLUMNS}}
        )
        write_result(args.out / "sweep.json", {"points": rows})
    print(table(rows))
    if parent:
        parent.end("FINISHED")
    failed = [row["run"] for row in rows if row["exit"]]
    if failed:
        print(f"{len(failed)} of {len(rows)} runs failed; see {args.out}/{failed[0]}/train.log")
    return 1 if failed else 0


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
