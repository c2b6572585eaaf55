"""Attempts at reading: each one has a time limit, and `retried` alone makes another."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from trainer.errors import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")
_LONGEST_PAUSE = 5.0  # seconds between attempts
_SAY_AFTER = 10.0  # seconds of silence before the log says what is waited for
_SLICE = 0.25  # seconds until a wait looks whether it was stopped


class Unreachable(DataError):
    """Bytes that did not arrive, in contrast to bytes that are damaged."""


class Final(DataError):
    """What no further attempt would change."""


class Refused(Unreachable, Final):
    """There is no such file, or access is denied."""


class Deadline:
    """The time that one attempt may take, all its waits together: data.timeout `seconds`, or until `stop` is set."""

    def __init__(self, seconds: float, stop: threading.Event | None = None):
        self.seconds, self._stop = seconds, stop or threading.Event()
        self._began = time.monotonic()
        self._end = self._began + seconds
        self._said = False

    @property
    def given_up(self) -> bool:
        """Whether `stop` is set."""
        return self._stop.is_set()

    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return 0.0 if self._stop.is_set() else max(0.0, self._end - time.monotonic())

    def wait(
        self, done: Callable[[float], bool], waiting_for: str, progress: Callable[[], object] = lambda: None
    ) -> None:
        """Call `done(seconds)`, which waits up to that long, until it is true.

        Raises Unreachable at the end of the time. A value of `progress` that changes starts the time afresh.
        `waiting_for` (redacted) is named in the error, and in a log line after a while.
        """
        seen = progress()
        while not done(min(_SLICE, self.left())):
            if self._stop.is_set():
                raise Unreachable(f"{waiting_for}: given up")
            if (now := progress()) != seen:
                seen, self._end = now, time.monotonic() + self.seconds
            if not self.left():
                raise Unreachable(f"{waiting_for} did not arrive within data.timeout={self.seconds:g} s")
            waited = time.monotonic() - self._began
            if not self._said and waited >= min(_SAY_AFTER, self.seconds / 2):
                self._said = True
                log.warning("waiting for %s since %.0f s; data.timeout=%g s", waiting_for, waited, self.seconds)

    def pause(self, seconds: float) -> None:
        """Sleep, but not past the end."""
        self._stop.wait(min(seconds, self.left()))


def retried(attempt: Callable[[Deadline], T], retries: int, timeout: float, stop: threading.Event | None = None) -> T:
    """The result of `attempt`, made at most 1 + retries times within (1 + retries) x timeout seconds, pauses included.

    Every DataError but a Final one makes another attempt; the last one is raised.
    """
    number = 0
    while True:
        deadline = Deadline(timeout, stop)
        try:
            return attempt(deadline)
        except Final:
            raise
        except DataError as error:
            if number == retries and isinstance(error, Unreachable):
                raise Unreachable(
                    f"{error}, {retries + 1} attempts failed; check the server and the network, or raise data.timeout "
                    "or data.retries"
                ) from None
            if number == retries or (stop is not None and stop.is_set()):
                raise
            log.info("%s, trying again", error)
        deadline.pause(min(0.1 * 2**number, _LONGEST_PAUSE))
        number += 1
