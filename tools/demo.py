"""What `alignsae demo` does; its arguments and its help are in tools/parsers."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from trainer.errors import UserError

SCRIPT = Path(__file__).parent / "configs" / "demo.sh"
MADE = tuple(Path(name) for name in ("data/demo", "models/demo", "runs/demo", "runs/demo-unsupervised"))


def run(args: argparse.Namespace) -> int:
    """Run the script with the commands of this environment; its exit code."""
    there = [str(path) for path in MADE if path.exists()]
    if there and not args.again:
        raise UserError(f"{', '.join(there)} would be replaced; give --again, or go to another folder")
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(["bash", str(SCRIPT)], env={**os.environ, "PATH": commands}, check=False).returncode
