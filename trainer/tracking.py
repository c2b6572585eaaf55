"""Where figures go: a JSONL that is always written, and MLflow, whose failures never stop training. The only home of mlflow."""

import json
import logging
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class TrackingConfig:
    """MLflow store and names."""

    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else a SQLite file beside the run folder; "off": JSONL only
    experiment: str = "alignsae"
    run_name: str | None = None  # None: the name of the run folder


class Tracker:
    """Writes metrics.jsonl in the run folder and mirrors it to MLflow.

    Args:
        run_dir: the run folder.
        config: store and names.
        params: resolved configuration, flat.
        tags: further tags; the git revision is added.
        step: step that training starts from; later lines of an earlier attempt are dropped.
    """

    def __init__(
        self, run_dir: Path, config: TrackingConfig, params: Mapping[str, Any], tags: Mapping[str, str], step: int
    ):
        self.path = run_dir / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if _step_of(line) <= step] if step else []
        self.path.write_text("".join(kept))
        self._file = self.path.open("a")
        self._run_file = run_dir / "mlflow_run_id"
        self._mlflow: Any = None
        self._config = config
        if config.uri != "off":
            self._guard(self._start, run_dir, params, {**tags, "git_revision": git_revision()}, step)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """One line of metrics.jsonl, and its numbers to MLflow by step."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        self._guard(lambda: self._mlflow.log_metrics(numbers, step=step, synchronous=False))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file with the MLflow run."""
        self._guard(lambda: self._mlflow.log_artifact(str(path), folder))

    def close(self, status: str = "FINISHED") -> None:
        """Flush and end the run with an MLflow status: FINISHED, FAILED or KILLED."""
        self._file.close()
        self._guard(lambda: (self._mlflow.flush_async_logging(), self._mlflow.end_run(status)))

    def _start(self, run_dir: Path, params: Mapping[str, Any], tags: Mapping[str, str], step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow  # imported here: it takes seconds, and ranks that do not track never need it

        self._mlflow = mlflow
        connect(mlflow, self._config.uri, run_dir)
        run_id = self._run_file.read_text().strip() if step and self._run_file.exists() else None
        _experiment(mlflow, self._config.experiment, run_dir)
        run = mlflow.start_run(run_id=run_id, run_name=self._config.run_name or run_dir.name, log_system_metrics=False)
        self._run_file.write_text(run.info.run_id + "\n")
        mlflow.set_tags(dict(tags))
        if run_id is None:
            items = [(k, str(v)[:6000]) for k, v in params.items()]
            for i in range(0, len(items), 100):  # MLflow takes 100 params a call
                mlflow.log_params(dict(items[i : i + 100]))

    def _guard(self, action: Any, *args: Any) -> None:
        """Run an MLflow call; the first failure turns MLflow off for this run and says so."""
        if action != self._start and self._mlflow is None:
            return
        try:
            action(*args)
        except Exception as error:
            self._mlflow = None
            log.warning(
                "MLflow is off for the rest of this run (%s: %s); metrics.jsonl goes on",
                type(error).__name__,
                str(error)[:200],
            )


def add_artifacts(run_dir: Path, uri: str | None, paths: list[Path]) -> bool:
    """Attach files made after training (plots, report) to the run's MLflow run; False when the run was not tracked or the store fails."""
    run_file = run_dir / "mlflow_run_id"
    if uri == "off" or not run_file.exists():
        return False
    try:
        import mlflow

        connect(mlflow, uri, run_dir)
        for path in paths:
            mlflow.MlflowClient().log_artifact(
                run_file.read_text().strip(), str(path), "plots" if path.suffix == ".png" else None
            )
    except Exception as error:
        log.warning("not stored in MLflow (%s: %s)", type(error).__name__, str(error)[:200])
        return False
    return True


def connect(mlflow: Any, uri: str | None, run_dir: Path) -> None:
    """Point mlflow at the configured store, MLFLOW_TRACKING_URI, or the SQLite file beside the run folder."""
    mlflow.set_tracking_uri(
        uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    )


def _experiment(mlflow: Any, name: str, run_dir: Path) -> None:
    """Select the experiment; one made in a local database keeps its artifacts beside it instead of in the working directory."""
    local = mlflow.get_tracking_uri().startswith("sqlite:")
    if local and mlflow.get_experiment_by_name(name) is None:
        mlflow.create_experiment(name, artifact_location=(run_dir.resolve().parent / "mlartifacts").as_uri())
    mlflow.set_experiment(name)


def git_revision() -> str:
    """Revision of the source tree that runs, with `-dirty` for local changes; `unknown` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def _step_of(line: str) -> float:
    """Step of a line; a line cut short by a crash counts as later than any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
