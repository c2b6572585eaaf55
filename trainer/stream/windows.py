"""Windows of one source, opened: their blocks read and checked, their rows ready to be copied into batches."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from trainer.labels import unknown_as_none, widened
from trainer.stream.blocks import BlockRows
from trainer.stream.plan import Cut, Order, Part, Plan, Window, step_within, steps_within
from trainer.stream.source import BlockSource
from trainer.stream.sources import Sources

COLUMNS = 4  # of a batch beside its activations: row id, answer, valid, outlier; then M of concepts


class _Window(NamedTuple):
    """A lane's window, opened: everything to copy its rows [start, stop) of the epoch into batches."""

    start: int
    stop: int
    columns: np.ndarray  # int64 [COLUMNS + M, n], in reading order
    within: np.ndarray  # int64 [n] row within its block
    step: int  # of the epoch, that the first row is of
    edges: list[int]  # run r is rows [edges[r], edges[r + 1]): one step, one block
    takes: list[Callable]  # per run, `take` of the block's activations
    first_run: list[int]  # step s, counted from the window's first, has the runs [first_run[s], first_run[s + 1])


class Windows:
    """The windows of one source that a rank's lanes are in, shared by the threads that read.

    source: its blocks. sources, number: which of them it is. order: of its rows. lanes: how many the rank has.
    openers: threads that open the windows that come next; None: they are opened when they are needed.
    """

    def __init__(
        self,
        source: BlockSource,
        sources: Sources,
        number: int,
        order: Order,
        lanes: int,
        openers: ThreadPoolExecutor | None,
    ):
        self.source, self._sources, self._number, self._order = source, sources, number, order
        self._name, self._first_row = list(sources.manifests)[number], sources.first_rows[number]
        self._keep, self._openers = 4 * lanes, openers
        self._opened: dict[tuple[int, int, int], Future[_Window]] = {}  # oldest first
        # Lane -> epoch and window of what was copied last, where the next step most often goes on.
        self._current: dict[int, tuple[int, _Window]] = {}
        self._lock = threading.Lock()

    def copy(self, part: Part, lane: int, acts: np.ndarray, columns: np.ndarray, at: int) -> None:
        """Write a lane's rows of a part into rows at, at + 1, ... of acts [B, D] and of columns [COLUMNS + M, B]."""
        first, last = part.first, part.first + part.share
        epoch, opened = self._current.get(lane, (-1, None))
        if opened is not None and epoch == part.epoch and opened.start < first and last <= opened.stop:
            self._copy(opened, part, acts, columns, at)
            return
        for window in part.order.windows_of(part.epoch, lane, first, last):
            opened = self._open(part, lane, window)
            self._copy(opened, part, acts, columns, at)
            self._current[lane] = part.epoch, opened

    @staticmethod
    def _copy(opened: _Window, part: Part, acts: np.ndarray, columns: np.ndarray, at: int) -> None:
        """`copy` of the rows that are in one window."""
        first, start = part.first, opened.start
        shift = at + start - first
        a, b = max(first, start) - start, min(first + part.share, opened.stop) - start
        columns[:, a + shift : b + shift] = opened.columns[:, a:b]
        step_here = part.step - opened.step
        r, end = opened.first_run[step_here], opened.first_run[step_here + 1]
        edges, within = opened.edges, opened.within
        for run in range(r, end):
            low, high = edges[run], edges[run + 1]
            # mode "clip" writes straight into `out`; "raise" would go through a buffer. Indices are in range.
            opened.takes[run](within[low:high], 0, acts[low + shift : high + shift], "clip")

    def close(self) -> None:
        """Let go of all windows and of the shards."""
        self._opened.clear()
        self._current.clear()
        self.source.close()

    def _open(self, part: Part, lane: int, window: Window) -> _Window:
        """The opened window.

        The step in which a window begins (or the first one after a start in its middle) also has the lane's next window
        opened in the background.
        """
        future, mine = self._claim(part.epoch, lane, window)
        if self._openers is not None:
            self._open_next(part, lane, window)
        if mine:
            self._fill(future, part.order, part.cuts, part.epoch, lane, window)
        return future.result()

    def _claim(self, epoch: int, lane: int, window: Window) -> tuple["Future[_Window]", bool]:
        """The future of a window, and whether the caller is the one to fill it."""
        name = (epoch, lane, window.number)
        with self._lock:
            future = self._opened.get(name)
            if future is not None:
                return future, False
            future = self._opened[name] = Future()
            if len(self._opened) > self._keep:
                del self._opened[next(iter(self._opened))]
            return future, True

    def _fill(
        self, future: "Future[_Window]", order: Plan, cuts: tuple[Cut, ...], epoch: int, lane: int, window: Window
    ) -> None:
        try:
            opened = self._build(order.window_rows(epoch, lane, window, cuts), order, cuts, window)
        except BaseException as error:
            future.set_exception(error)
            return
        future.set_result(opened)

    def _open_next(self, part: Part, lane: int, window: Window) -> None:
        order, cuts, epoch, first = part.order, part.cuts, part.epoch, window.stop
        if first >= order.rows_per_lane:
            epoch, first = epoch + 1, 0
            order, cuts = self._order.laid_out(self._number, epoch)
        following = order.windows_of(epoch, lane, first, first + 1)[0]
        future, mine = self._claim(epoch, lane, following)
        if mine and self._openers is not None:
            self._openers.submit(self._fill, future, order, cuts, epoch, lane, following)

    def _build(self, rows: np.ndarray, order: Plan, cuts: tuple[Cut, ...], window: Window) -> _Window:
        """rows: those of the window in reading order, int64 [n]."""
        starts = order.block_starts
        numbers = np.searchsorted(starts, rows, side="right") - 1
        within = rows - starts[numbers]
        blocks = self.source.many(np.unique(numbers).tolist())
        ordered = [blocks[number] for number in sorted(blocks)]
        first_rows = np.cumsum([0, *(len(block.valid) for block in ordered)])
        place = first_rows[np.searchsorted(sorted(blocks), numbers)] + within
        concepts = self._concepts(ordered)
        columns = np.empty((COLUMNS + concepts.shape[1], len(rows)), dtype=np.int64)
        columns[0] = rows + self._first_row
        for column, name in zip(columns[1:COLUMNS], ("answer", "valid", "outlier"), strict=True):
            column[:] = np.concatenate([getattr(block, name) for block in ordered])[place]
        columns[1] = self._sources.relabel(self._name, columns[1], "answers")
        columns[COLUMNS:] = concepts[place].T
        step = steps_within(window, cuts)
        new_run = np.flatnonzero((np.diff(numbers, prepend=-1) != 0) | (np.diff(step, prepend=-1) != 0))
        takes = {number: block.acts.take for number, block in blocks.items()}
        return _Window(
            window.start,
            window.stop,
            columns,
            within,
            step=step_within(window.start, cuts),
            edges=[*new_run.tolist(), len(rows)],
            takes=[takes[number] for number in numbers[new_run].tolist()],
            first_run=np.searchsorted(step[new_run], np.arange(step[-1] + 2)).tolist(),
        )

    def _concepts(self, blocks: list[BlockRows]) -> np.ndarray:
        """Labels int32 [n, M] of the rows of these blocks, as training is to take them."""
        labels = np.concatenate([widened(block.concept, self._sources.manifest.concepts_per_row) for block in blocks])
        labels = self._sources.relabel(self._name, labels, "concepts")
        return labels if self.source.config.unlabelled == "unknown" else unknown_as_none(labels)
