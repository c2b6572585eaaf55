"""Tracking: MLflow gets what metrics.jsonl gets, and can fail or hang without training noticing."""

import json
import socket
import time
from pathlib import Path

import pytest

from tests.support.runs import STEPS_PER_EPOCH, TOTAL, metrics, train_here
from trainer.journal import Journal
from trainer.tracking import Tracker, TrackingConfig, add_artifacts, connect

ALL = ["tracking.uri=null"]


@pytest.fixture(autouse=True)
def no_store_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_sqlite_beside_the_run_by_default_and_one_run_over_resumes(small_data: Path, tmp_path: Path) -> None:
    assert train_here(tmp_path, small_data, *ALL, "run.log_every=5", "stages.1.epochs=1") == 0
    run_id = (tmp_path / "run" / "mlflow_run_id").read_text().strip()
    client = connect(None, tmp_path / "run")
    assert train_here(tmp_path, small_data, *ALL, "run.log_every=5") == 0
    assert (tmp_path / "run" / "mlflow_run_id").read_text().strip() == run_id
    run = client.get_run(run_id)
    assert (tmp_path / "mlflow.db").exists() and run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["dictionary.free_slots"] == "40" and run.data.params["stages.1.name"] == "align"
    assert {"git_revision", "manifest_digest"} <= run.data.tags.keys()
    points = {m.step: m.value for m in client.get_metric_history(run_id, "loss/rec")}
    assert points == {step: line["loss/rec"] for step, line in metrics(tmp_path).items()}
    assert {a.path for a in client.list_artifacts(run_id)} >= {"config.yaml", "outcome.json"}
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"png")
    assert add_artifacts(tmp_path / "run", None, [plot])
    assert [a.path for a in client.list_artifacts(run_id, "plots")] == ["plots/plot.png"]


def test_a_server_that_does_not_answer_holds_nothing_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as server:  # accepts connections and says nothing
        server.bind(("127.0.0.1", 0))
        server.listen()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        tracker = Tracker(tmp_path, TrackingConfig(uri=uri), {}, {}, 0)
        for step in range(100):
            tracker.log({"step": step, "loss": 1.0}, step)
        assert time.monotonic() - began < 3
        tracker.close(patience=0.5)
        assert time.monotonic() - began < 6
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100
    assert "metrics.jsonl" in caplog.text


def test_a_store_that_fails_is_named_once(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert train_here(tmp_path, small_data, "tracking.uri=http://127.0.0.1:9", "run.log_every=1") == 0
    assert sum("MLflow is off" in m and ":9/" in m for m in map(str, caplog.messages)) == 1
    assert list(metrics(tmp_path)) == list(range(1, TOTAL + 1))
    assert not add_artifacts(tmp_path / "run", "off", [])


def test_uri_off_needs_no_mlflow(small_data: Path, tmp_path: Path) -> None:
    assert train_here(tmp_path, small_data, "tracking.uri=off", "stages=[{name: pretrain, epochs: 1}]") == 0
    assert list(metrics(tmp_path)) == list(range(1, STEPS_PER_EPOCH + 1))
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "run" / "mlflow_run_id").exists()


def test_journal_drops_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 1')
    Journal(path, 2).write({"step": 3, "again": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "again": True},
    ]  # fmt: skip
    Journal(path, 0)
    assert path.read_text() == ""


def test_journal_survives_a_disk_that_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "gone" / "metrics.jsonl", 0)
    journal.write({"step": 1})
    journal.write({"step": 2})
    assert sum("cannot be written" in r.getMessage() for r in caplog.records) == 1
    (tmp_path / "gone").mkdir()
    journal.write({"step": 3})
    assert (tmp_path / "gone" / "metrics.jsonl").read_text() == '{"step": 3}\n'
