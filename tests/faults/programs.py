"""Runs as programs of their own: one process, or several ranks under torchrun, with what each wrote kept apart."""

import subprocess
import sys
from pathlib import Path

from tests.support.commands import ROOT
from tests.support.ranks import clean_environment
from tests.support.runs import arguments


def environment(**more: str) -> dict[str, str]:
    """Of a started process: one thread, no launcher's variables."""
    return clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def command(world: int, argv: list[str], program: Path | None = None) -> list[str]:
    """Command line of trainer.train, or of a program, on `world` ranks."""
    target = ["-m", "trainer.train"] if program is None else [str(program)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world > 1 else []
    return [sys.executable, *launcher, *target, *argv]


def launch(
    folder: Path, data: Path, *overrides: str, world: int = 1, program: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Train in folder/run on `world` ranks and wait for the end."""
    return subprocess.run(
        command(world, arguments(folder, data, *overrides), program),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
