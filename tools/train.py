"""What `alignsae train` does; its arguments and its help are in tools/parsers."""

import argparse
import difflib
import shlex
import sys
from pathlib import Path

from trainer.errors import UserError
from trainer.strategies.launching import start

FILES = Path("launch/accelerate")


def run(args: argparse.Namespace) -> int:
    """Train; the exit code of the rank that failed first."""
    options = shlex.split(args.accelerate)
    if args.launch:
        options += ["--config_file", str(launch_path(args.launch))]
    if args.processes is not None:
        if args.processes < 1:
            raise UserError(f"--processes {args.processes} must be at least 1")
        options += [
            "--num_processes",
            str(args.processes),
            *(["--multi_gpu"] if args.processes > 1 and not args.launch else []),
        ]
    code, said = start(options, ["--config", args.config, *args.overrides])
    if said:
        print(f"alignsae train: error: {said}", file=sys.stderr)
    return code


def launch_path(name: str) -> Path:
    """The launch file of a name or path. Raises UserError, with the nearest name, when there is none."""
    for path in (Path(name), FILES / name, FILES / f"{name}.yaml", _beside(name)):
        if path.is_file():
            return path
    known = sorted({path.stem for path in [*FILES.glob("*.yaml"), *_beside("x").parent.glob("*.yaml")]})
    near = difflib.get_close_matches(Path(name).stem, known, n=1, cutoff=0.0)
    raise UserError(f"--launch {name}: there is no such file" + (f"; the nearest name is {near[0]}" if near else ""))


def _beside(name: str) -> Path:
    """Launch file that comes with this tool."""
    return Path(__file__).parent / FILES / f"{name}.yaml"
