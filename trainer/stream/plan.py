"""Who reads which row when: a pure function of (manifest digest, seed, epoch), known to every rank beforehand.

An epoch permutes the blocks and lays their rows end to end. L lanes get equal consecutive runs of that sequence, so a
block on a border is shared by two lanes and a data set with fewer blocks than lanes still fills every lane. Inside its
run a lane shuffles rows within windows of W blocks. Step s takes the next G/L rows of every lane; rows of one lane and
step are sorted by row id, which groups them by block and changes nothing about which rows are in a batch.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Sequence
from functools import cached_property
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


class Cut(NamedTuple):
    """From row `offset` of a lane's epoch on a step takes `share` rows; the first of these steps is `step` of the
    epoch."""

    offset: int
    share: int
    step: int


class Part(NamedTuple):
    """What one source gives to a step: rows [first, first + share) of every lane's run in an epoch.

    source: number of the source. order: its plan, which laid out the epoch. cuts: of the epoch into steps, in order.
    step: number of the step within the epoch, by the cuts.
    """

    source: int
    order: "Plan"
    epoch: int
    first: int
    share: int
    cuts: tuple[Cut, ...]
    step: int


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


class Order(Protocol):
    """The order of the rows of a run: a Plan for one data set, a Mixture for several."""

    rows_per_lane_step: int

    @property
    def steps_per_epoch(self) -> int: ...
    def parts(self, step: int) -> list[Part]: ...
    def laid_out(self, source: int, epoch: int) -> tuple["Plan", tuple[Cut, ...]]: ...
    def step_rows(self, step: int) -> np.ndarray: ...
    def epochs_at(self, step: int) -> dict[str, float]: ...
    def state(self, step: int) -> dict[str, Any]: ...
    def resume(self, state: dict[str, Any]) -> int: ...


def check_batch(global_batch: int, lanes: int) -> None:
    """Raise UserError, with the nearest settings that go, unless lanes divide the batch."""
    for name, value in (("global_batch", global_batch), ("lanes", lanes)):
        if value < 1:
            raise UserError(f"data.{name}={value} must be at least 1")
    if global_batch % lanes:
        near = max(lanes, round(global_batch / lanes) * lanes)
        raise UserError(
            f"data.lanes={lanes} does not divide data.global_batch={global_batch}; nearest settings: "
            f"data.global_batch={near} or data.lanes={nearest_divisor(global_batch, lanes)}"
        )


def resumed_step(state: dict[str, Any], ours: dict[str, Any], other: Collection[str]) -> int:
    """The step of a saved position; raises UserError where it differs from ours in anything but the `other` names."""
    for name, value in ours.items():
        if name not in other and state.get(name) != value:
            setting = {"manifest": "data.shards", "rows": "data.shards", "seed": "run.seed"}.get(name, f"data.{name}")
            raise UserError(
                f"the saved position was made with {name}={state.get(name)!r}, this run has {value!r}; "
                f"restore {setting} or start without resuming"
            )
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise UserError(f"the saved position has step={step!r:.40}, which is no step; start without resuming")
    return step


def step_within(row: int, cuts: Sequence[Cut]) -> int:
    """Step of the epoch that a row of a lane's run is of."""
    for cut in reversed(cuts):
        if cut.offset <= row:
            break
    return cut.step + (row - cut.offset) // cut.share


def steps_within(window: Window, cuts: Sequence[Cut]) -> np.ndarray:
    """Step of each row of a window, counted from that of its first row; int64 [rows of the window]."""
    rows = np.arange(window.start, window.stop)
    steps = np.zeros_like(rows)
    for cut in cuts:
        later = slice(max(cut.offset - window.start, 0), None)
        steps[later] = (rows[later] - cut.offset) // cut.share + cut.step
    return steps - step_within(window.start, cuts)


class Plan:
    """The order of rows of one data set. Cheap: it holds block sizes and two epochs' block orders, never a list of
    all rows.

    data: a Manifest (anything with block_rows and digest). global_batch G, lanes L, window W blocks.
    The incomplete last batch of an epoch is dropped: fewer than G rows, different ones every epoch.
    Raises UserError when L does not divide G or when the data set is smaller than one batch.
    """

    def __init__(self, data: BlockLayout, seed: int, global_batch: int, lanes: int, window: int):
        check_batch(global_batch, lanes)
        if window < 1:
            raise UserError(f"data.window={window} must be at least 1")
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

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """Of an epoch whose steps all take G/L rows of a lane."""
        return (Cut(0, self.rows_per_lane_step, 0),)

    def parts(self, step: int) -> list[Part]:
        """What a global step is made of."""
        epoch, within = self.locate(step)
        share = self.rows_per_lane_step
        return [Part(0, self, epoch, within * share, share, self.cuts, within)]

    def laid_out(self, source: int, epoch: int) -> tuple["Plan", tuple[Cut, ...]]:
        """The plan that an epoch was laid out by, and its cuts into steps."""
        return self, self.cuts

    def step_rows(self, step: int) -> np.ndarray:
        """Global row ids of the batch of a global step in position order; int64 [G]."""
        return self.batch_rows(*self.locate(step))

    def epochs_at(self, step: int) -> dict[str, float]:
        """Epochs read before a global step."""
        return {"epoch": step / self.steps_per_epoch}

    def lane_rows(self, epoch: int, step: int, lane: int) -> np.ndarray:
        """Global row ids that `lane` contributes to `step` (within the epoch); int64 [G/L], ascending per window."""
        share = self.rows_per_lane_step
        return self.part_rows(Part(0, self, epoch, step * share, share, self.cuts, step), lane)

    def part_rows(self, part: Part, lane: int) -> np.ndarray:
        """Row ids, in this data set, of a part that this plan laid out; int64 [share]."""
        first, found = part.first, []
        for window in self.windows_of(part.epoch, lane, first, first + part.share):
            rows = self._cached_window(part.epoch, lane, window, part.cuts)
            found.append(rows[max(first - window.start, 0) : first + part.share - window.start])
        return found[0].copy() if len(found) == 1 else np.concatenate(found)

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

    def window_rows(self, epoch: int, lane: int, window: Window, cuts: tuple[Cut, ...]) -> np.ndarray:
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
        step = steps_within(window, cuts) * self.rows
        return np.sort(rows + step) - step

    def state(self, step: int) -> dict[str, Any]:
        """Position before global step `step` as a small JSON object that names no rank."""
        return {
            "step": step, "manifest": self.digest, "seed": self.seed, "rows": self.rows,
            "global_batch": self.global_batch, "lanes": self.lanes, "window": self.window,
        }  # fmt: skip

    def resume(self, state: dict[str, Any]) -> int:
        """The step to continue from; raises UserError when the state belongs to another order of rows."""
        if "sources" in state:
            raise UserError(
                "the saved position is one in several sources, this run has data.shards; restore data.sources "
                "or start without resuming"
            )
        return resumed_step(state, self.state(0), {"step"})

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
            remember(self._windows, (epoch, lane), found, 2 * self.lanes)
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
            remember(self._epochs, epoch, found, 2)
        return found

    def _cached_window(self, epoch: int, lane: int, window: Window, cuts: tuple[Cut, ...]) -> np.ndarray:
        name = (epoch, lane, window.number)
        rows = self._shuffled.get(name)
        if rows is None:
            rows = self.window_rows(epoch, lane, window, cuts)
            remember(self._shuffled, name, rows, 2 * self.lanes)
        return rows


def remember(cache: dict, name: Any, value: Any, keep: int) -> None:
    """Put a value into a cache of at most `keep` entries."""
    cache[name] = value
    for oldest in list(cache)[:-keep]:
        cache.pop(oldest, None)
