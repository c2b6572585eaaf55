"""`alignsae frontier` trains a grid point by point, measures all alike, and goes on where it was."""

import json
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.data import write_data
from tests.support.runs import write_config
from tools.cli import main
from tools.frontiers.points import choose, compared, comparison, table


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


def assert_tracked(out: Path, points: list[dict]) -> None:
    """One run of all points, in which a trainer's FVU is drawn over L0, and of each that was trained tracked a run with
    its figures."""
    client = MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
    parent = client.get_run((out / "mlflow_run_id").read_text().strip())
    tracked = client.search_runs([parent.info.experiment_id])
    parts = [run for run in tracked if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    for point in points:
        runs = [part for part in parts if part.info.run_name == point["name"]]
        assert len(runs) == (point is not points[1])
        for run in runs:
            assert run.data.metrics["frontier/heldout_fvu"] == point["heldout"]["fvu"]
            assert run.data.metrics["frontier/heldout_l0"] == point["heldout"]["l0"] and "loss" in run.data.metrics
        name = point["trainer"] if point["share"] == 1.0 else f"{point['trainer']}_share_0.67"
        assert parent.data.metrics[f"frontier/fvu/{name}"] == pytest.approx(point["heldout"]["fvu"])
    assert {step.step for step in client.get_metric_history(parent.info.run_id, "frontier/fvu/relu")} == {6}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"frontier.json", "frontier.png"}
    assert len(parts) == len(points) - 1 and parent.info.status == "FINISHED"


@pytest.mark.slow
def test_a_grid_is_trained_measured_and_gone_on_with(
    tmp_path: Path, splits: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    assert main(command(tmp_path, splits, "--gates", "batch_topk", "--lr", "3e-3")) == 0
    kept = tmp_path / "out/batch_topk-l0-6-lr-0.003-seed-0/point.json"
    first = kept.stat().st_mtime_ns
    tracked = ["--set", "tracking.uri=null"]
    assert main(command(tmp_path, splits, "--lr", "3e-3", "--shares", "0.67", *tracked)) == 0  # and relu
    assert kept.stat().st_mtime_ns == first
    points = json.loads((tmp_path / "out/frontier.json").read_text())["points"]
    assert [point["trainer"] for point in points] == ["relu", "batch_topk"] * 2
    assert [point["rows"] for point in points] == [3 * 48] * 2 + [2 * 48] * 2
    for point in points:
        assert 0 < point["heldout"]["fvu"] == point["validation"]["fvu"] and point["heldout"]["l0"] > 0
        assert point["cpu_seconds"] > 0 and 0 <= point["dead"] <= 1 and point["chosen"]
    assert (tmp_path / "out/frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert "| batch_topk | 6 | 0.003 |" in capsys.readouterr().out
    assert_tracked(tmp_path / "out", points)
    assert main(command(tmp_path, splits, "--lr", "3e-3", steps=4)) == 2
    assert "made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--l0", "9999"], "dictionary.target_l0=9999"),
        (["--heldout", "/nowhere"], "/nowhere"),
        (["--shares", "1.5"], "--shares"),
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


def test_trainers_are_compared_at_equal_l0_over_seeds() -> None:
    def point(trainer: str, aimed: int, l0: float, fvu: float, seed: int = 0, share: float = 1.0) -> dict:
        measured = {"heldout": {"fvu": fvu, "l0": l0}, "validation": None, "dead": 0.0, "chosen": True, "rows": 100}
        seconds = 10.0 * share * (1 if trainer == "batch_topk" else 3)
        who = {"trainer": trainer, "aimed_l0": aimed, "lr": 1e-3, "seed": seed, "share": share}
        return who | measured | {"cpu_seconds": seconds}

    found = [point("sparsify_topk", l0, l0, 8 / l0, seed) for l0 in (32, 64) for seed in (0, 1)]
    found += [point("batch_topk", l0, 2 * l0, 0.9 * 8 / (2 * l0) * s, share=s) for l0 in (32, 64) for s in (1.0, 0.5)]
    found += [point("batch_topk", 32, 64, 0.1, seed=1)]  # a point alone stays where it is
    rows = {(row["trainer"], row["aimed_l0"], row["share"]): row for row in compared(found)}
    assert rows["sparsify_topk", 64, 1.0]["fvu"] == pytest.approx([8 / 64] * 2)
    assert sorted(rows["batch_topk", 32, 1.0]["fvu"]) == pytest.approx([0.1, 0.9 * 8 / 32])
    assert rows["batch_topk", 64, 0.5]["fvu"] == pytest.approx([0.45 * 8 / 64])
    assert rows["sparsify_topk", 64, 1.0]["reached"] == 5.0
    assert "| 64 | sparsify_topk | 1 | 0.1250 (0.1250-0.1250) | 1.000 | 30 | 5 s, 0.17 of its own |" in comparison(
        list(rows.values())
    )
    assert "| sparsify_topk | 32 | 0.001 | 1 | 2 | 32.0 | 0.2500 (0.2500-0.2500) | - |" in table(found)


@pytest.mark.slow
def test_an_interpreter_without_the_peers_says_so(
    tmp_path: Path, splits: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    more = ["--gates", "relu", "--lr", "1e-3", "--peers", "sparsify_topk", "--peers-python", sys.executable]
    assert main(command(tmp_path, splits, *more)) == 2
    assert "No module named 'sparsify'" in capsys.readouterr().err
