"""`alignsae frontier` trains a grid point by point, measures all alike, and goes on where it was."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.data import write_data
from tests.support.runs import write_config
from tools.cli import main
from tools.frontiers.points import choose


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training and held-out rows."""
    folder = tmp_path_factory.mktemp("splits")
    return {"train": write_data(folder / "train", concepts=[]), "heldout": write_data(folder / "heldout", concepts=[])}


def command(tmp_path: Path, splits: dict[str, Path], *more: str, steps: int = 3) -> list[str]:
    changes = {"data": {"shards": str(splits["train"])}, "stages": [{"name": "pretrain", "steps": steps}]}
    config = write_config(tmp_path, changes)
    rows = ["--heldout", str(splits["heldout"]), "--validation", str(splits["heldout"])]
    return ["frontier", "--config", str(config), *rows, "--out", str(tmp_path / "out"), "--l0", "6", *more]


@pytest.mark.slow
def test_a_grid_is_trained_measured_and_gone_on_with(
    tmp_path: Path, splits: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    assert main(command(tmp_path, splits, "--gates", "batch_topk", "--lr", "3e-3")) == 0
    kept = tmp_path / "out/batch_topk-l0-6-lr-0.003-seed-0/point.json"
    first = kept.stat().st_mtime_ns
    assert main(command(tmp_path, splits, "--lr", "3e-3")) == 0  # and relu
    assert kept.stat().st_mtime_ns == first
    points = json.loads((tmp_path / "out/frontier.json").read_text())["points"]
    assert [point["trainer"] for point in points] == ["relu", "batch_topk"]
    for point in points:
        assert 0 < point["heldout"]["fvu"] == point["validation"]["fvu"] and point["heldout"]["l0"] > 0
        assert point["cpu_seconds"] > 0 and 0 <= point["dead"] <= 1 and point["chosen"] and point["rows"] == 3 * 48
    assert (tmp_path / "out/frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert "| batch_topk | 6 | 0.003 |" in capsys.readouterr().out
    assert main(command(tmp_path, splits, "--lr", "3e-3", steps=4)) == 2
    assert "made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--l0", "9999"], "dictionary.target_l0=9999"),
        (["--heldout", "/nowhere"], "/nowhere"),
        (["--gates", "batch_topk", "--set", "optim.lrr=1"], "'optim.lr'"),
    ],
)
def test_mistakes_are_found_before_training(
    tmp_path: Path, splits: dict[str, Path], more: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(command(tmp_path, splits, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_rate_is_chosen_on_validation_rows() -> None:
    def point(lr: float, validation: float, heldout: float) -> dict:
        measured = {"heldout": {"fvu": heldout}, "validation": {"fvu": validation}}
        return {"trainer": "relu", "aimed_l0": 8, "lr": lr, **measured}

    found = [point(1e-3, 0.2, 0.1), point(3e-3, 0.1, 0.3), point(3e-3, 0.2, 0.3), point(1e-3, 0.3, 0.1)]
    choose(found)
    assert [one["chosen"] for one in found] == [False, True, True, False]


@pytest.mark.slow
def test_an_interpreter_without_the_peers_says_so(
    tmp_path: Path, splits: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    more = ["--gates", "relu", "--lr", "1e-3", "--peers", "sparsify_topk", "--peers-python", sys.executable]
    assert main(command(tmp_path, splits, *more)) == 2
    assert "No module named 'sparsify'" in capsys.readouterr().err
