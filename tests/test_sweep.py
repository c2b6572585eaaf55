"""`alignsae sweep` trains every point of a grid and tabulates where it ended."""

import json
import sys

import pytest
from mlflow import MlflowClient

from tests.support.runs import write_config
from tools.cli import main
from trainer.tracking import TrackingConfig, open_parent


@pytest.fixture
def config(small_data, tmp_path):
    tracked = {"tracking": {"uri": None}}
    changes = {"data": {"shards": str(small_data)}, "stages": [{"name": "pretrain", "steps": 2}], **tracked}
    return write_config(tmp_path, changes)


@pytest.mark.slow
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
    parent = (out / "mlflow_run_id").read_text().strip()
    client = MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {run.info.run_name for run in runs if run.data.tags.get("mlflow.parentRunId") == parent} == {
        "loss.sp=0.1",
        "loss.sp=0.3",
    }
    assert client.get_run(parent).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(parent)] == ["sweep.json"]


def test_the_run_of_all_points_ends_as_they_do_and_keeps_no_credentials(tmp_path):
    said = {"set": ["tracking.uri=http://user:Pa55word@host:5000"]}
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(KeyboardInterrupt), open_parent(tmp_path, TrackingConfig(uri=store), said) as parent:
        parent.add({"fvu": 0.5}, 32, 1.0)
        parent.add({"fvu": 0.5}, 32, 1.0)
        raise KeyboardInterrupt
    assert parent.settings == [f"tracking.parent={(tmp_path / 'mlflow_run_id').read_text().strip()}"]
    client = MlflowClient(tracking_uri=store)
    run = client.get_run(parent.settings[0].removeprefix("tracking.parent="))
    assert run.info.status == "KILLED" and "Pa55word" not in str(run.data) and "***@host:5000" in str(run.data)
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "fvu")] == [(32, 0.5)]
    with open_parent(tmp_path / "off", TrackingConfig(uri="off"), {}) as parent:
        parent.add({"fvu": 0.5}, 32, 1.0)
    assert parent.settings == [] and not (tmp_path / "off").exists()


@pytest.mark.parametrize("grid,message", [("loss.sp", "KEY=V1"), ("loss.spp=1", "'loss.sp'")])
def test_mistakes_are_found_before_training(config, tmp_path, grid, message, capsys):
    assert main(["sweep", "--config", str(config), "--grid", grid, "--out", str(tmp_path / "s")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
