"""Where figures go: a JSONL that is always written, and MLflow, whose failures never stop training. The only home of mlflow."""

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from trainer.errors import UserError
from trainer.journal import Journal

log = logging.getLogger(__name__)


MAX_METRICS = 1000  # that MLflow takes in one call


@dataclass
class TrackingConfig:
    """MLflow store and names."""

    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else a SQLite file beside the run folder; "off": JSONL only
    experiment: str = "alignsae"
    run_name: str | None = None  # None: the name of the run folder

    def validate(self) -> None:
        """Raise UserError for a name that cannot be."""
        if not self.experiment:
            raise UserError("tracking.experiment is empty; name an experiment")


class Tracker:
    """Writes metrics.jsonl in the run folder and mirrors it to MLflow.

    Args:
        run_dir: the run folder.
        config: store and names.
        params: resolved configuration, flat.
        tags: further tags; the git revision is added.
        step: step that training starts from; later lines of an earlier attempt are dropped, and the MLflow run goes on.
    """

    def __init__(
        self, run_dir: Path, config: TrackingConfig, params: Mapping[str, Any], tags: Mapping[str, str], step: int
    ):
        self._journal = Journal(run_dir / "metrics.jsonl", step)
        self._mirror: _Mirror | None = None
        if config.uri != "off":
            tags = {**tags, "git_revision": git_revision()}
            self._mirror = _Mirror(lambda: _open_run(run_dir, config, params, tags, resumed=step > 0))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """One line of metrics.jsonl, and its numbers to MLflow by step."""
        self._journal.write(values)
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        if self._mirror is not None:
            self._mirror.put(_Numbers(numbers, step, int(time.time() * 1000)))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file with the MLflow run."""
        if self._mirror is not None:
            self._mirror.put(lambda client, run_id: client.log_artifact(run_id, str(path), folder))

    def close(self, status: str = "FINISHED", patience: float = 60.0) -> None:
        """End the run with an MLflow status: FINISHED, FAILED or KILLED. MLflow gets at most `patience` seconds for what is left."""
        if self._mirror is not None:
            self._mirror.put(lambda client, run_id: client.set_terminated(run_id, status))
            self._mirror.close(patience)


class _Numbers(NamedTuple):
    values: dict[str, float]
    step: int
    milliseconds: int


_Action = Callable[[Any, str], Any]  # of an MlflowClient and a run id


class _Mirror:
    """MLflow in a thread of its own: importing it, making its database or trying a server that does not answer take seconds to
    minutes, which training does not wait for. The first failure turns it off and says so.

    open_run: returns an MlflowClient and the id of the run.
    """

    def __init__(self, open_run: Callable[[], tuple[Any, str]]):
        self._open_run = open_run
        self._queue: SimpleQueue[_Numbers | _Action | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, item: _Numbers | _Action) -> None:
        if self._thread.is_alive():
            self._queue.put(item)

    def close(self, patience: float) -> None:
        self._queue.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            log.warning("MLflow did not take everything within %.0f s; metrics.jsonl is complete", patience)

    def _work(self) -> None:
        try:
            client, run_id = self._open_run()
            item = self._queue.get()
            while item is not None:
                if isinstance(item, _Numbers):
                    item = self._log(client, run_id, item)
                    continue
                item(client, run_id)
                item = self._queue.get()
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            log.warning(
                "MLflow is off for the rest of this run (%s: %s); metrics.jsonl goes on", type(error).__name__, text
            )

    def _log(self, client: Any, run_id: str, item: _Numbers) -> _Numbers | _Action | None:
        """Log this and the numbers behind it in one call; returns the first item that is none."""
        from mlflow.entities import Metric

        metrics: list[Any] = []
        following: _Numbers | _Action | None = item
        while isinstance(following, _Numbers) and len(metrics) + len(following.values) <= MAX_METRICS:
            metrics += [Metric(k, v, following.milliseconds, following.step) for k, v in following.values.items()]
            if self._queue.empty():
                client.log_batch(run_id, metrics=metrics)
                return self._queue.get()
            following = self._queue.get()
        client.log_batch(run_id, metrics=metrics)
        return following


def _open_run(
    run_dir: Path, config: TrackingConfig, params: Mapping[str, Any], tags: Mapping[str, str], resumed: bool
) -> tuple[Any, str]:
    """A client, and the run that mlflow_run_id names if training resumed, else a new one."""
    client = connect(config.uri, run_dir)
    run_file = run_dir / "mlflow_run_id"
    if resumed and run_file.exists():
        run_id = run_file.read_text().strip()
        with suppress(_mlflow_exception()):  # a store that was deleted since then
            client.update_run(run_id, status="RUNNING")
            return client, run_id
    from mlflow.entities import Param

    experiment = _experiment(client, config.experiment, run_dir, config.uri)
    run_id = client.create_run(experiment, run_name=config.run_name or run_dir.name, tags=dict(tags)).info.run_id
    items = [Param(k, str(v)[:6000]) for k, v in params.items()]
    for i in range(0, len(items), 100):  # MLflow takes 100 params a call
        client.log_batch(run_id, params=items[i : i + 100])
    run_file.write_text(run_id + "\n")
    return client, run_id


def _mlflow_exception() -> type[Exception]:
    from mlflow.exceptions import MlflowException

    return MlflowException


def add_artifacts(run_dir: Path, uri: str | None, paths: list[Path]) -> bool:
    """Attach files made after training (plots, report) to the run's MLflow run; False when the run was not tracked or the store fails."""
    run_file = run_dir / "mlflow_run_id"
    if uri == "off" or not run_file.exists():
        return False
    try:
        client = connect(uri, run_dir)
        for path in paths:
            client.log_artifact(run_file.read_text().strip(), str(path), "plots" if path.suffix == ".png" else None)
    except Exception as error:
        log.warning("not stored in MLflow (%s: %s)", type(error).__name__, " ".join(str(error).split())[:200])
        return False
    return True


def store_uri(uri: str | None, run_dir: Path) -> str:
    """The configured store, MLFLOW_TRACKING_URI, or the SQLite file beside the run folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"


def connect(uri: str | None, run_dir: Path) -> Any:
    """An MlflowClient of `store_uri`."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own defaults try a server that does not answer for many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow  # imported here: it takes seconds, and ranks that do not track never need it

    return mlflow.MlflowClient(tracking_uri=store_uri(uri, run_dir))


def _experiment(client: Any, name: str, run_dir: Path, uri: str | None) -> str:
    """Id of the experiment; one made in a local database keeps its artifacts beside it instead of in the working directory."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    local = store_uri(uri, run_dir).startswith("sqlite:")
    folder = (run_dir.resolve().parent / "mlartifacts").as_uri() if local else None
    return client.create_experiment(name, artifact_location=folder)


def git_revision() -> str:
    """Revision of the source tree that runs, with `-dirty` for local changes; `unknown` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
