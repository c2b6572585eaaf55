"""The run of the store that runs in the subfolders of a folder are parts of: the points of a sweep or of a frontier."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any

from trainer.run_folder import RunFolder
from trainer.tracking.config import OFF, TrackingConfig, reason, store_uri
from trainer.tracking.description import describe
from trainer.tracking.points import Point, last_step
from trainer.tracking.store import StoredRun

log = logging.getLogger(__name__)


class Parent:
    """That run, or nothing where tracking is off or the store was away at the start, which is logged: the parts are
    then tracked without it. No failure of the store goes further than the log.

    settings: what the configuration of a part says. status: the one that the run will end with.
    """

    def __init__(self, folder: Path, config: TrackingConfig, params: Mapping[str, Any]):
        self._uri = store_uri(config.uri, folder / "run")
        self._run: StoredRun | None = None
        self.settings: list[str] = []
        self.status = "FINISHED"
        if config.uri == OFF:
            return
        try:
            self._run = StoredRun(folder, self._uri, describe(folder, config, params, {}, []), training=True)
            self.settings.append(f"tracking.parent={self._run.run_id}")
            if config.uri is None and not environ.get("MLFLOW_TRACKING_URI"):
                self.settings.append(f"tracking.uri={json.dumps(self._uri)}")  # the default of a part may be another
        except Exception as error:  # whatever a store may raise
            self._failed(error)

    def add(self, values: Mapping[str, float], step: int, when: float) -> None:
        """Numbers of the run itself, measured `when`, s since 1970; what it has already is not added twice."""
        if self._run is not None:
            self._add(self._run.run_id, values, step, when)

    def add_to(self, part: Path, values: Mapping[str, float], when: float) -> None:
        """The same for the run of a subfolder, at its last step."""
        folder = RunFolder(part)
        if self._run is not None and folder.mlflow_run_id.exists():
            self._add(folder.mlflow_run_id.read_text().strip(), values, last_step(folder.metrics), when)

    def artifact(self, path: Path) -> None:
        """Store a file with the run."""
        try:
            if self._run is not None:
                self._run.artifact(path, None)
        except Exception as error:
            self._failed(error)

    def end(self) -> None:
        """Give the run its terminal status."""
        try:
            if self._run is not None:
                self._run.end(self.status)
        except Exception as error:
            self._failed(error)

    def _add(self, run_id: str, values: Mapping[str, float], step: int, when: float) -> None:
        assert self._run is not None
        try:
            StoredRun.add_later(self._run.client, run_id, [Point(step, int(when * 1000), dict(values))])
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        log.warning("the run of all points is not level in MLflow (%s)", reason(error, self._uri))


@contextmanager
def open_parent(folder: Path, config: TrackingConfig, params: Mapping[str, Any]) -> Iterator[Parent]:
    """The run of a folder whose subfolders are runs, in the store that they use; it goes on where it exists, and ends
    with the block.

    params: what the runs have in common.
    """
    parent = Parent(folder, config, params)
    try:
        yield parent
    except BaseException as error:
        parent.status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        parent.end()
