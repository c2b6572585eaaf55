"""A list of commands that is gone through once, however often it is interrupted."""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trainer.errors import UserError
from trainer.files import read_json, write_json


@dataclass(frozen=True)
class Stage:
    """One `alignsae` command; started again after an interruption it goes on, or begins anew, by itself."""

    name: str
    command: Sequence[str]

    @property
    def line(self) -> str:
        """As one types it."""
        return shlex.join(["alignsae", *self.command])


class Done(msgspec.Struct):
    """A stage that ended well."""

    command: str
    seconds: float  # of the attempt that ended it


def read_done(path: Path) -> dict[str, Done]:
    """Stages that ended well, by name; none where the file is not there yet."""
    if not path.exists():
        return {}
    return read_json(path, dict[str, Done], "delete it to begin anew")


def run_stages(stages: Sequence[Stage], path: Path) -> int:
    """Run the stages that are not done, in order, and keep in `path` which are.

    Returns 0, or the exit code of the stage that failed or was interrupted. Raises UserError where a stage was done by
    another command than the one it would have now.
    """
    done = read_done(path)
    for stage in stages:
        if stage.name in done and done[stage.name].command != stage.line:
            raise UserError(
                f"{path}: {stage.name} was made by `{done[stage.name].command}`, and would be by `{stage.line}` now; "
                "take the settings it was begun with, or another --out"
            )
    for number, stage in enumerate(stages, start=1):
        if stage.name in done:
            continue
        print(f"== {number}/{len(stages)} {stage.name}: {stage.line}", flush=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "tools.cli", *stage.command], check=False).returncode
        if code:
            print(f"{stage.name} ended with exit code {code}; the same command goes on with it", file=sys.stderr)
            return code if code > 0 else 128 - code
        done[stage.name] = Done(stage.line, round(time.monotonic() - began, 1))
        write_json(path, msgspec.to_builtins(done))
    return 0
