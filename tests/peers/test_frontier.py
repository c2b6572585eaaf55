"""`alignsae frontier` with the real sae-lens and eai-sparsify beside ours."""

import json
from pathlib import Path

import pytest

from tests.peers.conftest import Peers
from tests.test_frontier import command, splits  # noqa: F401  # a fixture
from tools.cli import main


def test_peers_are_trained_on_the_same_rows(
    tmp_path: Path,
    splits: dict[str, Path],  # noqa: F811
    peers: Peers,
) -> None:
    more = ["--gates", "batch_topk", "--lr", "3e-3", "--peers-python", peers.python, "--peer-lr", "1e-2"]
    assert main(command(tmp_path, splits, *more, steps=150)) == 0
    points = {p["trainer"]: p for p in json.loads((tmp_path / "out/frontier.json").read_text())["points"]}
    assert set(points) == {"batch_topk", "saelens_batchtopk", "saelens_jumprelu", "sparsify_topk"}
    for point in points.values():
        assert point["heldout"]["fvu"] < 0.9 and point["heldout"]["rows"] == points["batch_topk"]["heldout"]["rows"]
    assert points["sparsify_topk"]["heldout"]["l0"] == pytest.approx(6.0, abs=0.5)
