"""Who reads which row when: a pure function of (manifest digest, seed, epoch), known to every rank beforehand.

An epoch permutes the blocks and lays their rows end to end. L lanes get equal consecutive runs of that sequence, so a
block on a border is shared by two lanes and a data set with fewer blocks than lanes still fills every lane. Inside its
run a lane shuffles rows within windows of W blocks. Step s takes the next G/L rows of every lane; rows of one lane and
step are sorted by row id, which groups them by block and changes nothing about which rows are in a batch.
"""

import hashlib
from bisect import bisect_right
from itertools import pairwise
from math import isqrt
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import numpy as np

from trainer.errors import UserError
from trainer.stream.digest import mix64


class BlockLayout(Protocol):
    """What the plan needs to know of a data set; a Manifest is one."""

    @property
    def block_rows(self) -> np.ndarray: ...
    @property
    def digest(self) -> str: ...


class Window(NamedTuple):
    """A lane's rows [start, stop) of an epoch, counted within the lane, that are shuffled together."""

    number: int
    start: int
    stop: int


class _Epoch(NamedTuple):
    first_row: np.ndarray  # global id of the first row of each block in permuted order; int64 [blocks]
    begins: np.ndarray  # rows before each block in permuted order; int64 [blocks]
    ends: np.ndarray  # rows up to the end of each block in permuted order; int64 [blocks]
    start: int  # where the first lane begins in the permuted sequence
    row_key: np.uint64  # key of the shuffle inside windows


_stop = attrgetter("stop")


def lanes_of_rank(lanes: int, data_rank: int, data_world: int) -> range:
    """The run of lanes that a data rank owns; raises UserError unless the number of data ranks divides the lanes."""
    if data_world < 1 or lanes % data_world:
        ranks = max(data_world, 1)
        raise UserError(
            f"data.lanes={lanes} cannot be split over {data_world} data ranks; "
            f"use {nearest_divisor(lanes, data_world)} ranks or data.lanes={max(1, round(lanes / ranks)) * ranks}"
        )
    share = lanes // data_world
    return range(data_rank * share, (data_rank + 1) * share)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted`."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return min((*small, *(number // d for d in small)), key=lambda d: (abs(d - wanted), d))


class Plan:
    """The order of rows. Cheap: it holds block sizes and two epochs' block orders, never a list of all rows.

    data: a Manifest (anything with block_rows and digest). global_batch G, lanes L, window W blocks.
    The incomplete last batch of an epoch is dropped: fewer than G rows, different ones every epoch.
    Raises UserError when L does not divide G or when the data set is smaller than one batch.
    """

    def __init__(self, data: BlockLayout, seed: int, global_batch: int, lanes: int, window: int):
        for name, value in (("global_batch", global_batch), ("lanes", lanes), ("window", window)):
            if value < 1:
                raise UserError(f"data.{name}={value} must be at least 1")
        if global_batch % lanes:
            near = max(lanes, round(global_batch / lanes) * lanes)
            raise UserError(
                f"data.lanes={lanes} does not divide data.global_batch={global_batch}; nearest settings: "
                f"data.global_batch={near} or data.lanes={nearest_divisor(global_batch, lanes)}"
            )
        self.block_rows = np.asarray(data.block_rows, dtype=np.int64)
        self.rows = int(self.block_rows.sum())
        if self.rows < global_batch:
            raise UserError(
                f"the data set has {self.rows} rows, fewer than one batch of data.global_batch={global_batch}; "
                f"set data.global_batch to at most {self.rows - self.rows % lanes if self.rows >= lanes else self.rows}"
            )
        self.digest, self.seed = data.digest, seed
        self.global_batch, self.lanes, self.window = global_batch, lanes, window
        self.rows_per_lane_step = global_batch // lanes
        self.steps_per_epoch = self.rows // global_batch
        self.rows_per_lane = self.steps_per_epoch * self.rows_per_lane_step  # per epoch
        self.block_starts = np.concatenate([[0], np.cumsum(self.block_rows)])
        # Caches of pure results, oldest first; a race between threads costs a second computation, nothing else.
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[tuple[int, int], list[Window]] = {}
        self._shuffled: dict[tuple[int, int, int], np.ndarray] = {}

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within the epoch) of a global step."""
        return divmod(step, self.steps_per_epoch)

    def lane_rows(self, epoch: int, step: int, lane: int) -> np.ndarray:
        """Global row ids that `lane` contributes to `step` (within the epoch); int64 [G/L], ascending per window."""
        first = step * self.rows_per_lane_step
        parts = []
        for window in self.windows_of(epoch, lane, first, first + self.rows_per_lane_step):
            rows = self._cached_window(epoch, lane, window)
            parts.append(rows[max(first - window.start, 0) : first + self.rows_per_lane_step - window.start])
        return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)

    def batch_rows(self, epoch: int, step: int) -> np.ndarray:
        """Global row ids of one global batch in position order, lane after lane; int64 [G]."""
        return np.concatenate([self.lane_rows(epoch, step, lane) for lane in range(self.lanes)])

    def windows_of(self, epoch: int, lane: int, first: int, last: int) -> list[Window]:
        """Windows that cover the lane's rows [first, last) of an epoch, in order."""
        windows = self._lane_windows(epoch, lane)
        low = bisect_right(windows, first, key=_stop)
        high = low
        while windows[high].stop < last:
            high += 1
        return windows[low : high + 1]

    def window_rows(self, epoch: int, lane: int, window: Window) -> np.ndarray:
        """Global row ids of a window in reading order; int64 [window.stop - window.start]."""
        order = self._epoch(epoch)
        low = order.start + lane * self.rows_per_lane
        begin, end = low + window.start, low + window.stop
        head, tail = np.searchsorted(order.ends, [begin, end - 1], side="right")
        blocks = slice(head, tail + 1)
        lengths = np.minimum(order.ends[blocks], end) - np.maximum(order.begins[blocks], begin)
        rows = np.repeat(order.first_row[blocks] - order.begins[blocks], lengths) + np.arange(begin, end)
        rows = rows[np.argsort(mix64(rows.astype(np.uint64) ^ order.row_key))]
        # Sort within each step: reading then visits every block once, from front to back.
        step = np.arange(window.start, window.stop) // self.rows_per_lane_step - window.start // self.rows_per_lane_step
        step *= self.rows
        return np.sort(rows + step) - step

    def state(self, step: int) -> dict[str, Any]:
        """Position before global step `step` as a small JSON object that names no rank."""
        return {
            "step": step, "manifest": self.digest, "seed": self.seed, "rows": self.rows,
            "global_batch": self.global_batch, "lanes": self.lanes, "window": self.window,
        }  # fmt: skip

    def resume(self, state: dict[str, Any]) -> int:
        """The step to continue from; raises UserError when the state belongs to another order of rows."""
        for name, value in self.state(0).items():
            if name != "step" and state.get(name) != value:
                setting = {"manifest": "data.shards", "rows": "data.shards", "seed": "run.seed"}.get(
                    name, f"data.{name}"
                )
                raise UserError(
                    f"the saved position was made with {name}={state.get(name)!r}, this run has {value!r}; "
                    f"restore {setting} or start without resuming"
                )
        step = state.get("step")
        if type(step) is not int or step < 0:
            raise UserError(f"the saved position has step={step!r:.40}, which is no step; start without resuming")
        return step

    def _lane_windows(self, epoch: int, lane: int) -> list[Window]:
        """All windows of a lane in an epoch: W blocks each, in the epoch's order, cut at the ends of the lane's run."""
        found = self._windows.get((epoch, lane))
        if found is None:
            if not 0 <= lane < self.lanes:
                raise UserError(f"lane {lane} does not exist; data.lanes={self.lanes}")
            order = self._epoch(epoch)
            low = order.start + lane * self.rows_per_lane
            high = low + self.rows_per_lane
            begin, last = np.searchsorted(order.ends, [low, high - 1], side="right").tolist()
            edges = [0, *(order.ends[begin + self.window - 1 : last : self.window] - low).tolist(), high - low]
            found = [Window(number, *pair) for number, pair in enumerate(pairwise(edges))]
            _remember(self._windows, (epoch, lane), found, 2 * self.lanes)
        return found

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            name = f"{self.digest}:{self.seed}:{epoch}".encode()
            block_key, row_key, offset = np.frombuffer(hashlib.sha256(name).digest(), "<u8")[:3]
            permuted = np.argsort(mix64(np.arange(len(self.block_rows), dtype=np.uint64) ^ block_key))
            # The rows that do not fill a batch are left out at both ends, so that no row is left out for good.
            spare = self.rows - self.steps_per_epoch * self.global_batch
            sizes = self.block_rows[permuted]
            ends = np.cumsum(sizes)
            found = _Epoch(self.block_starts[permuted], ends - sizes, ends, int(offset) % (spare + 1), row_key)
            _remember(self._epochs, epoch, found, 2)
        return found

    def _cached_window(self, epoch: int, lane: int, window: Window) -> np.ndarray:
        name = (epoch, lane, window.number)
        rows = self._shuffled.get(name)
        if rows is None:
            rows = self.window_rows(epoch, lane, window)
            _remember(self._shuffled, name, rows, 2 * self.lanes)
        return rows


def _remember(cache: dict, name: Any, value: Any, keep: int) -> None:
    """Put a value into a cache of at most `keep` entries."""
    cache[name] = value
    for oldest in list(cache)[:-keep]:
        cache.pop(oldest, None)
