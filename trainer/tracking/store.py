"""The run in the MLflow store. All of it may be done again after a failure: what the store has is not added twice."""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from trainer.run_folder import RunFolder
from trainer.tracking.config import split, store_uri
from trainer.tracking.description import RUN_KEY, DatasetInput, Description
from trainer.tracking.points import Point

log = logging.getLogger(__name__)

MAX_ITEMS = 100  # params or tags that MLflow takes in one call
MAX_DIGEST = 36  # characters of a data set's digest that MLflow takes


def connect(uri: str | None, run_dir: Path) -> Any:
    """An MlflowClient of `store_uri`."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Every failure comes back at once: the mirror tries again itself, after asking what arrived, and MLflow's own
    # repetition would take many minutes at a server that does not answer.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow  # imported here: it takes seconds, and ranks that do not track never need it

    return mlflow.MlflowClient(tracking_uri=_without_password(store_uri(uri, run_dir)))


def _without_password(uri: str) -> str:
    """An HTTP address without its credentials, which go where MLflow looks for them: its messages show addresses."""
    parts = split(uri)
    if parts.scheme.lower() not in ("http", "https") or not parts.password:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


class StoredRun:
    """A run of the store: the one that RUN/mlflow_run_id names, the one with the description's key, or a new one.

    Args:
        run_dir: the run folder.
        uri: the store as configured, credentials included.
        description: params, tags and inputs; those that the store lacks are added.
        training: the run goes on: its status becomes RUNNING.
    """

    def __init__(self, run_dir: Path, uri: str | None, description: Description, *, training: bool):
        self.client = connect(uri, run_dir)
        found = self._find(run_dir)
        if found is None:
            experiment = self._experiment(description.experiment, run_dir, store_uri(uri, run_dir))
            tags = {**description.tags, RUN_KEY: description.key}
            same = self.client.search_runs([experiment], f"tags.{RUN_KEY} = '{description.key}'", max_results=1)
            found = next(iter(same), None) or self.client.create_run(
                experiment, description.start_time, tags, description.run_name
            )
            with suppress(OSError):  # a full disk: the key finds the run
                RunFolder(run_dir).mlflow_run_id.write_text(found.info.run_id + "\n")
        self.run_id = found.info.run_id
        if training and found.info.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        self._describe(found, description)
        self._known = self._steps(found.data.metrics)

    def _find(self, run_dir: Path) -> Any:
        """The run that RUN/mlflow_run_id names; None when there is none or it was deleted."""
        from mlflow.exceptions import MlflowException

        run_file = RunFolder(run_dir).mlflow_run_id
        if not run_file.exists():
            return None
        try:
            found = self.client.get_run(run_file.read_text().strip())
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return found if found.info.lifecycle_stage == "active" else None

    def _experiment(self, name: str, run_dir: Path, uri: str) -> str:
        """Id of the experiment; a new one of a local database has its files beside it, not in the working folder."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        folder = (run_dir.resolve().parent / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
        return self.client.create_experiment(name, artifact_location=folder)

    def _describe(self, found: Any, description: Description) -> None:
        """Add params that are missing (MLflow changes none), tags that differ, and the inputs."""
        from mlflow.entities import Param, RunTag

        params = [Param(k, v) for k, v in description.params.items() if k not in found.data.params]
        tags = [RunTag(k, v) for k, v in description.tags.items() if found.data.tags.get(k) != v]
        for i in range(0, max(len(params), len(tags)), MAX_ITEMS):
            self.client.log_batch(
                self.run_id, params=params[i : i + MAX_ITEMS], tags=tags[i : i + MAX_ITEMS], synchronous=True
            )
        if description.inputs:
            self.client.log_inputs(self.run_id, datasets=[_dataset(item) for item in description.inputs])

    def _steps(self, keys: Sequence[str]) -> dict[str, frozenset[int]]:
        """Metric -> steps that the store has; equal sets are one, since most metrics share their steps."""
        sets: dict[frozenset[int], frozenset[int]] = {}
        known = {}
        for key in keys:
            if not key.startswith("system/"):
                steps = frozenset(metric.step for metric in self.client.get_metric_history(self.run_id, key))
                known[key] = sets.setdefault(steps, steps)
        return known

    def add(self, points: Sequence[Point]) -> int:
        """Log what the store did not have when it was opened, in one call; returns how many numbers that were."""
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, point.milliseconds, point.step)
            for point in points
            for key, value in point.values.items()
            if point.step not in self._known.get(key, ())
        ]
        if metrics:
            self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        return len(metrics)

    @staticmethod
    def add_later(client: Any, run_id: str, points: Sequence[Point]) -> int:
        """Log what was measured after training and is not there so far; returns how many numbers that were."""
        from mlflow.entities import Metric

        metrics = []
        for point in points:
            for key, value in point.values.items():
                known = client.get_metric_history(run_id, key)
                if not any((m.step, m.timestamp, m.value) == (point.step, point.milliseconds, value) for m in known):
                    metrics.append(Metric(key, value, point.milliseconds, point.step))
        if metrics:
            client.log_batch(run_id, metrics=metrics, synchronous=True)
        return len(metrics)

    def artifact(self, path: Path, folder: str | None) -> None:
        """Store a file under its name, in place of an earlier one; one that is gone is left out."""
        if not path.exists():
            return
        self.client.log_artifact(self.run_id, str(path), folder)

    def end(self, status: str, milliseconds: int | None = None) -> None:
        """Set a terminal status; to be called when all points are there. milliseconds: when it ended; None: now."""
        self.client.set_terminated(self.run_id, status, milliseconds)

    def system_monitor(self) -> Any:
        """MLflow's thread for figures of this machine, running, if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING asks for it."""
        from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING as ENABLED

        if not ENABLED.get():
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.client.tracking_uri)
        monitor.start()
        return monitor


def _dataset(item: DatasetInput) -> Any:
    """MLflow's entity. Its digest has room for half of a sha256; the whole one is in the profile."""
    from mlflow.entities import Dataset, InputTag
    from mlflow.entities import DatasetInput as Entity

    scheme = split(item.source).scheme
    return Entity(
        Dataset(
            name=item.name,
            digest=item.digest[:MAX_DIGEST],
            source_type=scheme if len(scheme) > 1 else "local",
            source=json.dumps({"uri": item.source}),
            profile=json.dumps({"num_rows": item.rows, "digest": item.digest}),
        ),
        [InputTag("mlflow.data.context", item.context)],
    )
