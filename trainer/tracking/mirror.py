"""A thread that keeps MLflow level with metrics.jsonl, through outages."""

import logging
import random
import threading
from collections import deque
from pathlib import Path
from typing import Any

from trainer.run_folder import RunFolder
from trainer.tracking.config import reason, shown, store_uri
from trainer.tracking.description import Description
from trainer.tracking.points import Backlog, Point
from trainer.tracking.store import StoredRun

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE, LONGEST_CLOSING_PAUSE = 1.0, 60.0, 1.0  # s between two attempts
MAX_REFUSED = 1000  # points in memory that the disk did not take


class Mirror:
    """MLflow in a thread of its own: importing it, making its database or trying a server that does not answer take
    seconds to minutes, which training does not wait for.

    Points are read from metrics.jsonl. After a failure nothing is known about what arrived, so the store is asked,
    after a pause that grows, and gets what it lacks.
    """

    def __init__(self, run_dir: Path, uri: str | None, description: Description):
        self._run_dir, self._uri, self._description = run_dir, uri, description
        self._refused: deque[Point] = deque(maxlen=MAX_REFUSED)
        self._artifacts: deque[tuple[Path, str | None]] = deque()
        self._late: list[tuple[Path, str | None]] = []  # artifacts that failed
        self._status: str | None = None  # terminal
        self._wake, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._monitor: Any = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """metrics.jsonl has grown."""
        self._wake.set()

    def keep(self, point: Point) -> None:
        """Take a point that the disk refused."""
        self._refused.append(point)
        self._wake.set()

    def artifact(self, path: Path, folder: str | None) -> None:
        """Store a file with the run."""
        self._artifacts.append((path, folder))
        self._wake.set()

    def close(self, status: str, patience: float) -> bool:
        """End the run when all is there, within `patience` seconds; False when that was too short."""
        self._status = status
        self._closing.set()
        self._wake.set()
        self._thread.join(patience)
        self._given_up.set()
        return not self._thread.is_alive()

    def _work(self) -> None:
        run: StoredRun | None = None
        failures = 0
        while not self._given_up.is_set():
            status = self._status  # before the points are looked at: those of a run that ends are all written
            try:
                if run is None:
                    run, backlog = self._open()
                    self._again()
                self._send(run, backlog)
                self._send_artifacts(run)
                if status is not None:
                    self._again()
                    self._send_artifacts(run)
                    self._stop_monitor()
                    run.end(status)
                    return
            except Exception as error:
                run = None
                failures += 1
                self._report(error, failures)
                self._pause(failures)
                continue
            if failures:
                log.info("MLflow answers again and has what it missed")
            failures = 0
            self._wake.wait()
            self._wake.clear()

    def _open(self) -> tuple[StoredRun, Backlog]:
        run = StoredRun(self._run_dir, self._uri, self._description, training=True)
        self._stop_monitor()  # MLflow's ends at the first failure
        self._monitor = run.system_monitor()
        return run, Backlog(RunFolder(self._run_dir).metrics)

    def _send(self, run: StoredRun, backlog: Backlog) -> None:
        """All that waits; what was sent is taken off only afterwards."""
        while not self._given_up.is_set() and (points := backlog.next()):
            run.add(points)
            backlog.accept()
        while self._refused:
            run.add([self._refused[0]])
            self._refused.popleft()

    def _send_artifacts(self, run: StoredRun) -> None:
        """New files. Where they cannot be stored (some stores take points alone) points and status go on without."""
        while self._artifacts:
            item = self._artifacts.popleft()
            try:
                run.artifact(*item)
            except Exception as error:
                if not self._late:
                    why = reason(error, store_uri(self._uri, self._run_dir))
                    log.warning("MLflow did not take %s (%s); it is offered again later", item[0].name, why)
                self._late.append(item)

    def _again(self) -> None:
        """Offer the files that failed once more."""
        self._artifacts.extend(self._late)
        self._late.clear()

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def _report(self, error: Exception, failures: int) -> None:
        uri = store_uri(self._uri, self._run_dir)
        message = "MLflow at %s fails (%s); it is tried again, and metrics.jsonl goes on"
        log.log(logging.WARNING if failures == 1 else logging.DEBUG, message, shown(uri), reason(error, uri))

    def _pause(self, failures: int) -> None:
        """Wait; less when the run ends. With jitter, so that the runs of a cluster do not come back all at once."""
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0)
        if self._closing.is_set():
            self._given_up.wait(min(pause, LONGEST_CLOSING_PAUSE))
        else:
            self._closing.wait(pause)
