"""metrics.jsonl as the points that wait for the store: read in batches, so that memory is bounded in any outage."""

import json
from pathlib import Path
from typing import NamedTuple

MAX_METRICS = 1000  # numbers that MLflow takes in one call
_NOT_METRICS = ("step", "time")


class Point(NamedTuple):
    """The numbers of one step, and when they were measured (ms since 1970)."""

    step: int
    milliseconds: int
    values: dict[str, float]


class Backlog:
    """The points of a metrics.jsonl that is being written, in order of step, from its beginning."""

    def __init__(self, path: Path):
        self.path = path
        self._offset, self._end = 0, 0  # in bytes: of what was accepted, of what `next` returned
        self._last: float = float("-inf")  # step of the last point returned

    def next(self) -> list[Point]:
        """Whole lines that follow those that were accepted, at most MAX_METRICS numbers; empty when there are none.

        Damaged lines and steps that do not go on from the last one are left out.
        """
        points: list[Point] = []
        numbers, self._end = 0, self._offset
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return points
        with file:
            written = int(self.path.stat().st_mtime * 1000)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    break
                point = _parse(line, written)
                if point is not None and point.step > self._last:
                    numbers += len(point.values)
                    if points and numbers > MAX_METRICS:
                        break
                    points.append(point)
                    self._last = point.step
                self._end += len(line)
        return points

    def accept(self) -> None:
        """What `next` returned is in the store."""
        self._offset = self._end


def last_step(path: Path) -> int:
    """The last step of a metrics.jsonl, 0 where it has none."""
    backlog, step = Backlog(path), 0
    while points := backlog.next():
        step = points[-1].step
        backlog.accept()
    return step


def point_of(line: dict[str, object], milliseconds: int) -> Point:
    """The point of a line of metrics.jsonl; `milliseconds` where the line has no time.

    Raises KeyError, TypeError, ValueError or OverflowError for a line without a step or with impossible numbers.
    """
    values = {k: float(v) for k, v in line.items() if isinstance(v, int | float) and k not in _NOT_METRICS}
    step, at = line["step"], line.get("time")
    if not isinstance(step, int):
        raise TypeError("step is no whole number")
    return Point(step, round(at * 1000) if isinstance(at, int | float) else milliseconds, values)


def _parse(line: bytes, milliseconds: int) -> Point | None:
    try:
        return point_of(json.loads(line), milliseconds)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None
