"""Commands as users type them, in the root of the checkout: accelerate, torchrun and python of this environment."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.ranks import LIMIT, clean_environment

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    """How a command ended: exit code, and what all its processes wrote."""

    code: int
    output: str


def program(name: str, *arguments: str) -> list[str]:
    """Command line of a program of this environment."""
    return [sys.executable if name == "python" else str(Path(sys.executable).parent / name), *arguments]


def torchrun(world: int, *arguments: str) -> list[str]:
    """Command line of `world` processes on a free port."""
    return program("torchrun", "--standalone", f"--nproc-per-node={world}", *arguments)


def start(command: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command, with more environment, without waiting for it."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(command: list[str], *, timeout: float = LIMIT, env: dict[str, str] | None = None) -> Result:
    """Start a command and wait for its end. Raises subprocess.TimeoutExpired when that takes too long."""
    with start(command, env) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Result(process.returncode, output)
