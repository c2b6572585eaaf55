"""`alignsae sweep` trains every point of a grid and tabulates where it ended."""

import json
import sys

import pytest
import torch

from tools.cli import main
from trainer.stream import ShardSpec, ShardWriter


@pytest.fixture
def config(tmp_path):
    spec = ShardSpec(width=8, dtype="float32", concepts=["a", "b"], answers=["x"])
    with ShardWriter(tmp_path / "shards", "train", spec) as writer:
        concept = torch.arange(64) % 2
        writer.write(torch.randn(64, 8) + concept[:, None], concept, torch.full((64,), -1))
    path = tmp_path / "c.yaml"
    path.write_text(
        f"data: {{shards: {tmp_path / 'shards'}, global_batch: 16, lanes: 2}}\ndictionary: {{free_slots: 12, bank_slots: 8}}\n"
        "stages: [{name: pretrain, steps: 2}]\ntracking: {uri: 'off'}\nkernel: dense\nrun: {log_every: 1}\n"
    )
    return path


def test_grid_is_trained_and_tabulated(config, tmp_path, capsys):
    out = tmp_path / "sweep"
    command = [
        "sweep",
        "--config",
        str(config),
        "--grid",
        "loss.sp=0.1,0.3",
        "--out",
        str(out),
        "--launcher",
        f"{sys.executable} -m",
    ]
    assert main(command) == 0
    points = json.loads((out / "sweep.json").read_text())["points"]
    assert [p["run"] for p in points] == ["loss.sp=0.1", "loss.sp=0.3"]
    assert all(p["exit"] == 0 and p["fvu"] > 0 for p in points)
    assert "loss.sp=0.3" in capsys.readouterr().out


@pytest.mark.parametrize("grid,message", [("loss.sp", "KEY=V1"), ("loss.spp=1", "'loss.sp'")])
def test_mistakes_are_found_before_training(config, tmp_path, grid, message, capsys):
    assert main(["sweep", "--config", str(config), "--grid", grid, "--out", str(tmp_path / "s")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
