"""What the loop and the tools call: metrics.jsonl first, MLflow after it."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.errors import DataError, UserError
from trainer.journal import Journal
from trainer.run_folder import RunFolder
from trainer.tracking.config import OFF, TrackingConfig, reason, shown, store_uri
from trainer.tracking.description import DatasetInput, Description, describe
from trainer.tracking.figures import points_of
from trainer.tracking.mirror import Mirror
from trainer.tracking.points import Backlog, point_of
from trainer.tracking.store import StoredRun, connect

log = logging.getLogger(__name__)

STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}  # of outcome.json -> of MLflow


class Tracker:
    """Writes metrics.jsonl in the run folder and mirrors it to MLflow.

    Args:
        run_dir: the run folder.
        config: store and names.
        params: resolved configuration, flat.
        tags: further tags, such as world size, device and strategy; source, user, versions and git revision are added.
        step: step that training starts from; later lines of an earlier attempt are dropped, and the MLflow run goes on.
        inputs: the shards.
    Raises UserError when metrics.jsonl cannot be taken up.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        step: int,
        *,
        inputs: Sequence[DatasetInput] = (),
    ):
        self._run_dir = run_dir
        folder = RunFolder(run_dir)
        self._journal = Journal(folder.metrics, step)
        description = describe(run_dir, config, params, tags, inputs)
        if step == 0:
            folder.mlflow_run_id.unlink(missing_ok=True)  # of another run
        elif earlier := _earlier(run_dir):
            description = replace(description, key=earlier.key, start_time=earlier.start_time)
        description.save(run_dir)
        self._mirror = None if config.uri == OFF else Mirror(run_dir, config.uri, description)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """One line of metrics.jsonl, with the time (s since 1970), and its numbers to MLflow by step."""
        line = {**values, "step": step, "time": round(time.time(), 3)}
        written = self._journal.write(line)
        if self._mirror is not None and written:
            self._mirror.wake()
        elif self._mirror is not None:
            self._mirror.keep(point_of(line, 0))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file with the MLflow run."""
        if self._mirror is not None:
            self._mirror.artifact(path, folder)

    def close(self, status: str = "FINISHED", patience: float = 60.0) -> None:
        """End the run with an MLflow status (FINISHED, FAILED or KILLED), which it gets after its points.

        MLflow has at most `patience` seconds for what is left.
        """
        if self._mirror is not None and not self._mirror.close(status, patience):
            log.warning(
                "MLflow did not take everything within %.0f s; metrics.jsonl is complete, and "
                "`alignsae track %s` fills in what is missing",
                patience,
                self._run_dir,
            )


def _earlier(run_dir: Path) -> Description | None:
    try:
        return Description.load(run_dir)
    except DataError as error:  # mlflow_run_id still finds the run
        log.warning("%s", error)
        return None


@dataclass(frozen=True)
class Filled:
    """What `fill_in` did: numbers added, MLflow's run id, its terminal status (None: the run has no outcome so far)."""

    numbers: int
    run_id: str
    status: str | None


def fill_in(run_dir: Path, uri: str | None = None) -> Filled:
    """Bring the MLflow run of a run folder level with metrics.jsonl: points, the status of outcome.json, files.

    uri: the store; None: that of the run. Raises UserError when there is nothing to enter or the store fails.
    """
    folder = RunFolder(run_dir)
    if not folder.metrics.is_file():
        raise UserError(f"{run_dir} has no {folder.metrics.name}; is it the folder of a training run?")
    description = Description.load(run_dir)
    if description is None:  # of a version that kept none
        description = Description(run_name=folder.name)
        description.save(run_dir)
    if uri is None and description.uri == OFF:
        raise UserError(f"{run_dir} was trained with tracking.uri=off; name the store with --uri")
    uri = store_uri(uri or description.uri, run_dir)
    ended, when = _outcome(folder.outcome)
    single = (folder.config, folder.outcome, folder.evaluation, folder.swap, folder.report)
    files: list[tuple[Path, str | None]] = [
        *((path, None) for path in single),
        *((path, folder.plots.name) for path in sorted(folder.plots.glob("*.png"))),
    ]
    try:
        run = StoredRun(run_dir, uri, description, training=False)
        backlog, numbers = Backlog(folder.metrics), 0
        while points := backlog.next():
            numbers += run.add(points)
            backlog.accept()
        numbers += StoredRun.add_later(run.client, run.run_id, points_of(folder))
        if ended is not None:
            run.end(ended, when)
        for path, inner in files:
            run.artifact(path, inner)
    except Exception as error:
        raise UserError(
            f"MLflow at {shown(uri)} fails ({reason(error, uri)}); try again, what it has is not added twice"
        ) from None
    return Filled(numbers, run.run_id, ended)


def _outcome(path: Path) -> tuple[str | None, int | None]:
    """MLflow's status for an outcome.json and when it was written (ms since 1970); None, None when there is none."""
    try:
        ended = json.loads(path.read_text(encoding="utf-8"))["status"]
        return STATUS[ended], int(path.stat().st_mtime * 1000)
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be used ({type(error).__name__}: {error}); remove it to leave the status"
        ) from error


def add_artifacts(run_dir: Path, uri: str | None, paths: list[Path]) -> bool:
    """Attach files made after training (plots, report) to the run's MLflow run.

    False when the run was not tracked or the store fails.
    """
    run_file = RunFolder(run_dir).mlflow_run_id
    if uri == OFF or not run_file.exists():
        return False
    try:
        client = connect(uri, run_dir)
        for path in paths:
            inner = RunFolder(run_dir).plots.name if path.suffix == ".png" else None
            client.log_artifact(run_file.read_text().strip(), str(path), inner)
    except Exception as error:
        log.warning("not stored in MLflow (%s)", reason(error, store_uri(uri, run_dir)))
        return False
    return True
