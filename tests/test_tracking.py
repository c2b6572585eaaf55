"""metrics.jsonl is the truth; MLflow gets all of it once, whatever happens to its server; training never waits."""

import json
import logging
import resource
import shutil
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.runs import STEPS_PER_EPOCH, TOTAL, metrics, train_here
from tests.tracking_server import Gate, Server, eventually, free_port, history
from tools.cli import main
from trainer.errors import UserError
from trainer.journal import Journal
from trainer.tracking import DatasetInput, Tracker, TrackingConfig, add_artifacts, add_figures, connect, mirror
from trainer.tracking.points import MAX_METRICS, Backlog

ALL = ["tracking.uri=null"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from outside; what `connect` sets is undone afterwards."""
    for name in ("URI", "USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
    for name in ("RUN_NAME", "EXPERIMENT_NAME", "ENABLE_SYSTEM_METRICS_LOGGING"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses; and a new time for every point that is sent, as the store hides a second point of the same time."""
    import mlflow.entities

    monkeypatch.setattr(mirror, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(mirror, "LONGEST_PAUSE", 0.3)
    Metric = mlflow.entities.Metric
    monkeypatch.setattr(mlflow.entities, "Metric", lambda k, v, _, step: Metric(k, v, time.time_ns() // 1000, step))


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}", path.parent).search_experiments()
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    shutil.copy(empty_store, server.folder / "server.db")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def gate(server: Server) -> Iterator[Gate]:
    with Gate(server.port) as gate:
        yield gate
        gate.shutdown()


@pytest.fixture
def run_dir(tmp_path: Path, empty_store: Path) -> Path:
    """A run folder beside MLflow's default store."""
    (tmp_path / "run").mkdir()
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path / "run"


def log_steps(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log({"step": step, "stage": "align", "loss": 1 / step, "loss/rec": float(step)}, step)


def run_id_of(run_dir: Path) -> str:
    return (run_dir / "mlflow_run_id").read_text().strip()


def assert_complete(client: Any, run_dir: Path, status: str) -> None:
    """The store has every point of metrics.jsonl once."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    run = client.get_run(run_id_of(run_dir))
    assert run.info.status == status
    assert set(run.data.metrics) == {"loss", "loss/rec"}
    for key in run.data.metrics:
        assert history(client, run.info.run_id, key) == Counter(line["step"] for line in lines if key in line), key


def outcome(run_dir: Path, status: str) -> None:
    (run_dir / "outcome.json").write_text(json.dumps({"status": status}))


def test_sqlite_beside_the_run_by_default_and_one_run_over_resumes(small_data: Path, tmp_path: Path) -> None:
    assert train_here(tmp_path, small_data, *ALL, "run.log_every=5", "stages.1.epochs=1") == 0
    run_id = run_id_of(tmp_path / "run")
    client = connect(None, tmp_path / "run")
    assert train_here(tmp_path, small_data, *ALL, "run.log_every=5") == 0
    assert run_id_of(tmp_path / "run") == run_id
    run = client.get_run(run_id)
    assert (tmp_path / "mlflow.db").exists() and run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["dictionary.free_slots"] == "40" and run.data.params["stages.1.name"] == "align"
    assert {"git_revision", "manifest_digest"} <= run.data.tags.keys()
    assert [run.data.tags[name] for name in ("world_size", "device", "strategy")] == ["1", "cpu", "single"]
    (shards,) = run.inputs.dataset_inputs
    assert json.loads(shards.dataset.profile)["digest"] == run.data.tags["manifest_digest"]
    points = client.get_metric_history(run_id, "loss/rec")
    assert [(m.step, m.value, m.timestamp / 1000) for m in points] == [
        (step, line["loss/rec"], line["time"]) for step, line in metrics(tmp_path).items()
    ]
    assert not {"step", "time", "stage"} & run.data.metrics.keys()
    assert {a.path for a in client.list_artifacts(run_id)} >= {"config.yaml", "outcome.json"}
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"png")
    assert add_artifacts(tmp_path / "run", None, [plot])
    assert [a.path for a in client.list_artifacts(run_id, "plots")] == ["plots/plot.png"]


def test_a_server_that_does_not_answer_holds_nothing_up(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as server:  # accepts connections and says nothing
        server.bind(("127.0.0.1", 0))
        server.listen()
        began = time.monotonic()
        tracker = Tracker(run_dir, TrackingConfig(uri=f"http://127.0.0.1:{server.getsockname()[1]}"), {}, {}, 0)
        log_steps(tracker, range(1, 101))
        assert time.monotonic() - began < 3
        tracker.close(patience=0.5)
        assert time.monotonic() - began < 6
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 100
    assert f"alignsae track {run_dir}" in caplog.text


def test_training_ends_without_its_store_which_is_named_once(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connect(None, tmp_path)  # imports mlflow, which takes longer than what is waited for here
    close = Tracker.close
    monkeypatch.setattr(Tracker, "close", lambda self, status, patience: close(self, status, 3.0))
    assert train_here(tmp_path, small_data, "tracking.uri=http://user:Pa55word@127.0.0.1:9", "run.log_every=1") == 0
    assert sum("http://***@127.0.0.1:9 fails" in message for message in caplog.messages) == 1
    texts = [path.read_text() for path in (tmp_path / "run").iterdir() if path.is_file()]
    assert len(texts) >= 4 and "Pa55word" not in "".join([*texts, caplog.text])
    assert list(metrics(tmp_path)) == list(range(1, TOTAL + 1))
    assert not add_artifacts(tmp_path / "run", "off", [])


def test_uri_off_needs_no_mlflow(small_data: Path, tmp_path: Path) -> None:
    assert train_here(tmp_path, small_data, "tracking.uri=off", "stages=[{name: pretrain, epochs: 1}]") == 0
    assert list(metrics(tmp_path)) == list(range(1, STEPS_PER_EPOCH + 1))
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "run" / "mlflow_run_id").exists()


def counts_one(in_store: Callable[[], dict[int, int]], step: int) -> bool:
    """Whether a step is in the store once."""
    return in_store()[step] == 1


def test_outages_and_lost_answers_lose_nothing_and_double_nothing(
    server: Server, gate: Gate, run_dir: Path, impatient: None
) -> None:
    client = connect(server.store, run_dir)
    tracker = Tracker(run_dir, TrackingConfig(uri=gate.uri), {"a": 1}, {}, 0)

    def arrived(step: int) -> bool:
        return history(client, run_id_of(run_dir), "loss/rec")[step] == 1

    def refused_up_to(count: int) -> bool:
        return gate.refused >= count

    for first in (1, 301, 601):
        log_steps(tracker, range(first, first + 10))
        eventually(lambda: (run_dir / "mlflow_run_id").exists())
        eventually(partial(arrived, first + 9))
        gate.lose(b"runs/log-batch")
        log_steps(tracker, range(first + 10, first + 20))
        eventually(lambda: gate.shut)
        log_steps(tracker, range(first + 20, first + 300))
        eventually(partial(refused_up_to, gate.refused + 2))
        gate.shut = False
    tracker.close(patience=30)
    assert_complete(client, run_dir, "FINISHED")
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 900


@pytest.mark.slow
def test_a_server_that_is_killed_three_times(tmp_path: Path, run_dir: Path) -> None:
    server = Server(tmp_path)
    tracker = Tracker(run_dir, TrackingConfig(uri=server.uri), {}, {}, 0)  # away at the start, too
    for first in (1, 101, 201):
        log_steps(tracker, range(first, first + 50))
        server.start()
        eventually(lambda: (run_dir / "mlflow_run_id").exists(), 90)
        client = connect(server.store, run_dir)
        in_store = partial(history, client, run_id_of(run_dir), "loss/rec")
        eventually(partial(counts_one, in_store, first + 49), 90)
        log_steps(tracker, range(first + 50, first + 100))
        server.kill()
    server.start()
    tracker.close(patience=60)
    try:
        assert_complete(client, run_dir, "FINISHED")
    finally:
        server.kill()


def test_away_at_the_start_and_an_answer_lost_while_the_run_is_made(
    server: Server, gate: Gate, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate.shut = True
    name = TrackingConfig(uri=gate.uri, experiment="away at start")
    tracker = Tracker(run_dir, name, {}, {}, 0)
    log_steps(tracker, range(1, 6))
    eventually(lambda: gate.refused)
    time.sleep(3.4)
    assert 2 <= gate.refused <= 4  # at 0, 0.5..1, 1.5..3, 3.5..7 s
    gate.lose(b"runs/create ")
    gate.shut = False
    eventually(lambda: gate.shut)
    gate.shut = False
    log_steps(tracker, range(6, 11))
    tracker.close(patience=30)
    client = connect(server.store, run_dir)
    assert_complete(client, run_dir, "FINISHED")
    assert len(client.search_runs([client.get_experiment_by_name("away at start").experiment_id])) == 1
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "fails" in r.getMessage()]


def test_away_at_the_end_then_track(
    server: Server, gate: Gate, run_dir: Path, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect(server.store, run_dir)
    tracker = Tracker(run_dir, TrackingConfig(uri=gate.uri), {}, {}, 0)
    log_steps(tracker, range(1, 6))
    eventually(lambda: (run_dir / "mlflow_run_id").exists())
    eventually(lambda: history(client, run_id_of(run_dir), "loss/rec")[5] == 1)
    gate.shut = True
    log_steps(tracker, range(6, 1001))
    outcome(run_dir, "finished")
    tracker.close(patience=0.5)
    assert main(["track", str(run_dir)]) == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert client.get_run(run_id_of(run_dir)).info.status == "RUNNING"
    gate.shut = False
    assert main(["track", str(run_dir)]) == 0 and f": {2 * 995} numbers" in capsys.readouterr().out
    assert_complete(client, run_dir, "FINISHED")
    assert main(["track", str(run_dir)]) == 0 and ": 0 numbers" in capsys.readouterr().out
    assert_complete(client, run_dir, "FINISHED")
    run = client.get_run(run_id_of(run_dir))
    assert run.info.end_time == int((run_dir / "outcome.json").stat().st_mtime * 1000)
    assert "outcome.json" in {a.path for a in connect(server.uri, run_dir).list_artifacts(run.info.run_id)}


def test_two_runs_are_compared_by_what_was_measured_of_each(server: Server, tmp_path: Path) -> None:
    """Over the REST interface that the pages of MLflow ask."""
    name = TrackingConfig(uri=server.uri, experiment="compared")
    figures = {"a": (0.5, 0.75, 0.875), "b": (0.25, 1.0, 0.5)}
    for run, (accuracy, success, recovered) in figures.items():
        folder = tmp_path / run
        folder.mkdir()
        tracker = Tracker(folder, name, {"dictionary.k": len(run)}, {}, 0)
        log_steps(tracker, range(1, 4))
        tracker.close(patience=30)
        held_out = {"heldout": {"binding": {"slot_accuracy": accuracy}}}
        lost = {"loss_recovered": {"recovered_over_mean": recovered}}
        (folder / "evaluation.json").write_text(json.dumps(held_out | lost))
        (folder / "swap.json").write_text(json.dumps({"slots": {"best_success": success, "best_alpha": 1.5}}))
        assert add_figures(folder)

    def asked(address: str, **said: Any) -> Any:
        body = json.dumps(said).encode()
        request = urllib.request.Request(server.uri + address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    experiment = connect(server.uri, tmp_path).get_experiment_by_name("compared").experiment_id
    found = asked("/api/2.0/mlflow/runs/search", experiment_ids=[experiment])["runs"]
    shown = {
        run["info"]["run_name"]: {m["key"]: (m["step"], m["value"]) for m in run["data"]["metrics"]} for run in found
    }
    for run, values in figures.items():
        for key, value in zip(("heldout/slot_accuracy", "swap/slots", "loss_recovered"), values, strict=True):
            assert shown[run][key] == (3, value)
        assert shown[run]["loss/rec"] == (3, 3.0)


def test_a_resumed_run_fills_in_what_its_earlier_attempts_missed(run_dir: Path, impatient: None) -> None:
    away = Tracker(run_dir, TrackingConfig(uri=f"http://127.0.0.1:{free_port()}"), {}, {}, 0)
    log_steps(away, range(1, 11))
    away.close("KILLED", patience=0.2)
    killed = Tracker(run_dir, TrackingConfig(), {}, {}, 5)
    log_steps(killed, range(6, 16))
    client = connect(None, run_dir)
    eventually(lambda: (run_dir / "mlflow_run_id").exists())
    eventually(lambda: history(client, run_id_of(run_dir), "loss/rec")[15] == 1)
    last = Tracker(run_dir, TrackingConfig(), {}, {}, 12)
    log_steps(last, range(13, 21))
    last.close("KILLED")
    assert_complete(client, run_dir, "KILLED")
    run_id = run_id_of(run_dir)
    anew = Tracker(run_dir, TrackingConfig(), {}, {}, 0)
    log_steps(anew, range(1, 3))
    anew.close()
    assert run_id_of(run_dir) != run_id
    assert_complete(client, run_dir, "FINISHED")


def test_a_run_is_described_and_credentials_stay_away(
    server: Server, gate: Gate, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_NAME", "named outside")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "described")
    uri = gate.uri.replace("//", "//user:Pa55word@")
    shards = DatasetInput("corpus", "https://reader:Pa55word@host/data?signature=Pa55word", "ab" * 32, 496)
    gate.shut = True  # messages of failures are looked at, too
    tracker = Tracker(
        run_dir,
        TrackingConfig(uri=uri, parent="f" * 32),
        {"tracking.uri": uri},
        {"world_size": "2", "device": "cpu"},
        0,
        inputs=[shards],
    )
    log_steps(tracker, range(1, 3))
    eventually(lambda: gate.refused)
    gate.shut = False
    tracker.close(patience=30)
    client = connect(server.store, run_dir)
    run = client.get_run(run_id_of(run_dir))
    assert run.info.run_name == "named outside"
    assert client.get_experiment(run.info.experiment_id).name == "described"
    assert run.data.tags | {"world_size": "2", "device": "cpu", "mlflow.parentRunId": "f" * 32} == run.data.tags
    expected = {"mlflow.user", "mlflow.source.name", "mlflow.source.git.commit", "version.torch", "version.python"}
    assert expected | {"version.accelerate", "version.deepspeed", "version.transformers"} <= run.data.tags.keys()
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("corpus", ("ab" * 32)[:36])
    assert json.loads(entry.dataset.source) == {"uri": "https://***@host/data?signature=***"}
    assert json.loads(entry.dataset.profile) == {"num_rows": 496, "digest": "ab" * 32}
    gate.shut = True
    assert main(["track", str(run_dir), "--uri", uri]) == 2
    stored = b"".join(
        path.read_bytes() for root in (run_dir, server.folder) for path in root.rglob("*") if path.is_file()
    )
    assert b"Pa55word" not in stored and "Pa55word" not in caplog.text and "fails" in caplog.text


def test_credentials_are_used_and_can_come_from_outside(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect("http://user:Pa%2055@host:1", run_dir)
    from mlflow.utils.credentials import read_mlflow_creds

    assert client.tracking_uri == "http://host:1"
    assert (read_mlflow_creds().username, read_mlflow_creds().password) == ("user", "Pa 55")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:Pa55word@host/db")
    from trainer.tracking.config import shown, store_uri

    assert store_uri("postgresql://***@host/db", run_dir) == "postgresql://user:Pa55word@host/db"
    assert store_uri("postgresql://host/other", run_dir) == "postgresql://host/other"
    for location in ("/Data/Mine", "sqlite:////tmp/A.db", "sqlite:///a.db", "databricks", "C:\\Data"):
        assert shown(location) == location
    for location in (
        "HTTP://user:Pa55word@host/A",
        "mysql+pymysql://user:Pa55word@host/a?password=Pa55word",
        "http://u:Pa55word@[",
    ):
        assert "Pa55word" not in shown(location) and "user" not in shown(location)


def test_figures_of_the_machine_when_asked_for(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracker = Tracker(run_dir, TrackingConfig(), {}, {}, 0)
    client = connect(None, run_dir)
    eventually(lambda: (run_dir / "mlflow_run_id").exists())
    eventually(lambda: "system/cpu_utilization_percentage" in client.get_run(run_id_of(run_dir)).data.metrics)
    tracker.close()
    assert client.get_run(run_id_of(run_dir)).info.status == "FINISHED"


def test_track_enters_a_run_that_was_not_tracked_and_refuses_what_is_none(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(run_dir, TrackingConfig(uri="off"), {"lr": 0.1}, {"device": "cpu"}, 0)
    log_steps(tracker, range(1, 6))
    tracker.close()
    outcome(run_dir, "interrupted")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    for folder in (tmp_path, run_dir):  # no run; a run of no store
        assert main(["track", str(folder)]) == 2 and len(capsys.readouterr().err.splitlines()) == 1
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert main(["track", str(run_dir), "--uri", uri]) == 0
    run = connect(uri, run_dir).get_run(run_id_of(run_dir))
    assert (run.info.status, run.data.params, run.data.tags["device"]) == ("KILLED", {"lr": "0.1"}, "cpu")
    (run_dir / "tracking.json").write_text('{"inputs": [], "params": 3}')
    assert main(["track", str(run_dir), "--uri", uri]) == 2 and "tracking.json" in capsys.readouterr().err


def test_the_status_comes_after_the_points_and_does_not_wait_for_files(
    run_dir: Path, impatient: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("not today")

    (run_dir / "config.yaml").write_text("a: 1\n")
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", lambda self, run_id, **more: more.get("metrics") and fails())
        tracker = Tracker(run_dir, TrackingConfig(), {}, {}, 0)
        log_steps(tracker, range(1, 3))
        eventually(lambda: (run_dir / "mlflow_run_id").exists())
        tracker.close(patience=1)
    client = connect(None, run_dir)
    assert client.get_run(run_id_of(run_dir)).info.status == "RUNNING"
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", fails)
    resumed = Tracker(run_dir, TrackingConfig(), {}, {}, 2)
    resumed.artifact(run_dir / "config.yaml")
    log_steps(resumed, range(3, 5))
    resumed.close()
    assert_complete(client, run_dir, "FINISHED")
    assert "did not take config.yaml (OSError: not today)" in caplog.text


@given(
    steps=st.lists(st.integers(0, 30), max_size=40),
    width=st.integers(0, 60),
    cuts=st.lists(st.tuples(st.integers(1, 200), st.booleans()), max_size=60),
)
def test_the_backlog_gives_every_whole_line_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], width: int, cuts: list[tuple[int, bool]]
) -> None:
    """The file grows by pieces that end anywhere; after a batch that is not accepted a new Backlog starts over."""
    path = tmp_path_factory.mktemp("backlog") / "metrics.jsonl"
    values = {f"m{i}": 0.5 for i in range(width)}
    text = b"".join(json.dumps({"step": step, "time": step / 4, **values}).encode() + b"\n" for step in steps)
    expected = [step for i, step in enumerate(steps) if step > max(steps[:i], default=-1)]
    backlog, taken, at = Backlog(path), [], 0
    for size, accepted in [*cuts, *[(len(text), True)] * (len(steps) + 1)]:
        with path.open("ab") as file:
            file.write(text[at : at + size])
        at += size
        points = backlog.next()
        assert sum(len(point.values) for point in points) <= MAX_METRICS
        assert all(point.values == values and point.milliseconds == point.step * 250 for point in points)
        if accepted:
            backlog.accept()
            taken += [point.step for point in points]
        elif points:
            backlog, taken = Backlog(path), []
    assert taken == expected


def test_a_point_that_the_disk_refuses_goes_to_mlflow(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(run_dir, TrackingConfig(), {}, {}, 0)
    log_steps(tracker, range(1, 3))
    (run_dir / "metrics.jsonl").rename(run_dir / "kept")
    (run_dir / "metrics.jsonl").mkdir()
    log_steps(tracker, range(3, 5))
    (run_dir / "metrics.jsonl").rmdir()
    (run_dir / "kept").rename(run_dir / "metrics.jsonl")
    tracker.close()
    assert history(connect(None, run_dir), run_id_of(run_dir), "loss") == Counter(range(1, 5))


def test_journal_drops_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 1')
    Journal(path, 2).write({"step": 3, "again": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "again": True},
    ]  # fmt: skip
    Journal(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("damaged", [False, True])
def test_journal_is_taken_up_on_a_full_disk_or_left_as_it_was(tmp_path: Path, damaged: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "".join(f'{{"step": {step}}}\n' for step in range(1, 100)) + "damaged\n" * damaged
    path.write_text(text + '{"step": 100}\n{"step": 101}\n')
    before = path.read_text()
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # what is larger cannot be written, as on a full disk
    try:
        if damaged:  # must be written again
            with pytest.raises(UserError, match="cannot be taken up at step 100"):
                Journal(path, 100)
        else:
            Journal(path, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert path.read_text() == (before if damaged else text + '{"step": 100}\n')
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_journal_survives_a_disk_that_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "gone" / "metrics.jsonl", 0)
    assert not journal.write({"step": 1})
    assert not journal.write({"step": 2})
    assert sum("cannot be written" in r.getMessage() for r in caplog.records) == 1
    (tmp_path / "gone").mkdir()
    assert journal.write({"step": 3})
    assert (tmp_path / "gone" / "metrics.jsonl").read_text() == '{"step": 3}\n'
