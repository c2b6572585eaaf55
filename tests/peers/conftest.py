"""The other trainers, in an interpreter of their own (`make test-peers`): they pin packages that this one does not
want."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parents[2]


class Peers:
    """A running peer.py."""

    def __init__(self, python: str):
        self.python = python
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )

    def ask(self, *command: Any) -> None:
        """One line of peer.py's text; fails the test with its error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(command, default=str), file=self._process.stdin, flush=True)
        said = self._process.stdout.readline().strip()
        assert said == "done", f"{command}: {said or 'the interpreter of the peers died'}"

    def make(self, kind: str, folder: Path, **settings: Any) -> Path:
        """A dictionary of that kind with random weights."""
        self.ask("make", kind, folder, settings)
        return folder

    def run(self, kind: str, folder: Path, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Code [N, S] and reconstruction [N, D] of rows [N, D]."""
        given, found = folder.parent / "given.safetensors", folder.parent / "found.safetensors"
        save_file({"rows": rows.contiguous()}, given)
        self.ask("run", kind, folder, given, found)
        tensors = load_file(found)
        return tensors["code"], tensors["reconstruction"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@pytest.fixture(scope="session")
def peers() -> Iterator[Peers]:
    """sae-lens and eai-sparsify in the interpreter ALIGNSAE_PEERS_PYTHON, or that of .venv-peers; skipped where
    there is none."""
    named = os.environ.get("ALIGNSAE_PEERS_PYTHON")
    python = named or str(ROOT / ".venv-peers/bin/python")
    if named and not Path(named).is_file():
        pytest.fail(f"ALIGNSAE_PEERS_PYTHON={named} is no interpreter")
    if not Path(python).is_file():
        pytest.skip("no interpreter with sae-lens and eai-sparsify; `make test-peers` makes one")
    found = Peers(python)
    yield found
    found.close()


@pytest.fixture
def rows() -> Tensor:
    """Raw activations [200, 12] with a mean that is not 0."""
    generator = torch.Generator().manual_seed(3)
    return 2.0 * torch.randn(200, 12, generator=generator) + torch.linspace(-1, 1, 12)
