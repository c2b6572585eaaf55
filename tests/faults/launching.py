"""Starting runs as processes: one, or several ranks by torchrun."""

import subprocess
import sys
from pathlib import Path

from small_run import arguments, quiet_environment

PROGRAM = Path(__file__).parent / "dying_train.py"


def command(world: int, argv: list[str], program: Path = PROGRAM) -> list[str]:
    """Command line of a launch on `world` ranks."""
    if world == 1:
        return [sys.executable, str(program), *argv]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    return [*torchrun, str(program), *argv]


def launch(
    folder: Path, data: Path, *overrides: str, world: int = 1, die_at: str = "", program: Path = PROGRAM
) -> subprocess.CompletedProcess[str]:
    """Train in folder/run on `world` ranks and wait for the end."""
    return subprocess.run(
        command(world, arguments(folder, data, *overrides), program),
        env=quiet_environment(DIE_AT=die_at),
        capture_output=True,
        text=True,
        timeout=300,
    )
