"""The stream: batches of this rank for consecutive global steps, read ahead by threads."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.labels import unknown_as_none, widened
from trainer.stream.blocks import BlockRows
from trainer.stream.config import DataConfig
from trainer.stream.manifest import STORED_DTYPES, Manifest
from trainer.stream.plan import Plan, Window
from trainer.stream.shards import TORCH_DTYPES, from_stored
from trainer.stream.source import BlockSource


@dataclass
class Batch:
    """B rows of one rank and one global step.

    acts [B, D] in the dtype of the shards; concept int64 [B, M], see trainer.labels, with one M for the data set;
    answer int64 [B], -1 for none; row_ids int64 [B], unique in the data set; positions int64 [B], place in the global
    batch (lane * G/L + i); valid bool [B], False for masked rows (damaged, not finite or outlier), which must weigh
    nothing; outlier bool [B], masked for its norm (data.max_norm); step, the global step.
    """

    acts: Tensor
    concept: Tensor
    answer: Tensor
    row_ids: Tensor
    positions: Tensor
    valid: Tensor
    outlier: Tensor
    step: int

    def _each(self, change) -> "Batch":
        return replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "step"})

    def pin(self) -> "Batch":
        """The batch in page-locked memory (CUDA only); what is there already is not copied."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))


class _Buffers:
    """Activation buffers that return to the pool when the last tensor on them is gone."""

    def __init__(self, shape: tuple[int, int], dtype: np.dtype, keep: int):
        self.shape, self.dtype = shape, dtype
        self.free: deque[np.ndarray] = deque(maxlen=keep)

    def take(self) -> np.ndarray:
        """An array [B, D]; its content is whatever was there."""
        try:
            buffer = self.free.pop()
        except IndexError:
            buffer = np.empty(self.shape, self.dtype)
        array = buffer[:]
        # A tensor made of `array` holds it, views included; when all are freed the memory can be filled again.
        weakref.finalize(array, self.free.append, buffer).atexit = False
        return array


class _Window(NamedTuple):
    """A lane's window, opened: everything to copy its rows into batches."""

    columns: np.ndarray  # int64 [4 + M, n]: row id, answer, valid, outlier, then concepts, in reading order
    within: np.ndarray  # int64 [n] row within its block
    edges: list[int]  # run r is rows [edges[r], edges[r + 1]): one step, one block
    takes: list[Callable]  # per run, `take` of the block's activations
    first_run: list[int]  # step s, counted from the window's first, has the runs [first_run[s], first_run[s + 1])


class Stream:
    """Iterator of Batch for the global steps start_step, start_step + 1, ...; it never ends.

    lanes: the run of lanes that this rank owns (`lanes_of_rank`). The batches depend on manifest, plan and lanes alone,
    not on threads or timing. With `pin` batches arrive in page-locked memory. Raises DataError for damage beyond the
    budgets.
    """

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        plan: Plan,
        lanes: range,
        start_step: int = 0,
        *,
        pin: bool = False,
    ):
        self.config, self.manifest, self.plan, self.lanes, self.pin = config, manifest, plan, lanes, pin
        self.step = start_step  # the next step that is handed out
        self.stall_seconds = 0.0
        self.source = BlockSource(config, manifest)
        self._ahead = 2 * config.threads
        shape = (len(lanes) * plan.rows_per_lane_step, manifest.width)
        self._buffers = _Buffers(shape, STORED_DTYPES[manifest.dtype], keep=self._ahead + 2)
        share = plan.rows_per_lane_step
        self._positions = torch.arange(lanes.start * share, lanes.stop * share)
        self._windows: dict[tuple[int, int, int], Future[_Window]] = {}  # oldest first
        self._lock = threading.Lock()
        self._queue: deque[Future[Batch]] = deque()
        self._readers = ThreadPoolExecutor(config.threads, "reader") if config.threads else None
        self._openers = ThreadPoolExecutor(config.threads, "opener") if config.threads else None
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The batch of `self.step`."""
        if self._closed:
            raise StopIteration
        began = time.perf_counter()
        if self._readers is None:
            batch = self._assemble(self.step)
        else:
            while len(self._queue) <= self._ahead:
                self._queue.append(self._readers.submit(self._assemble, self.step + len(self._queue)))
            # Taken off the queue only when it is whole: the next call raises an error again, no step is skipped.
            batch = self._queue[0].result()
            self._queue.popleft()
        self.step += 1
        self.stall_seconds += time.perf_counter() - began
        return batch

    def state(self) -> dict[str, Any]:
        """Position of the next batch as a small JSON object that names no rank (see Plan.resume)."""
        return self.plan.state(self.step)

    def counters(self) -> dict[str, int]:
        """Masked and reread blocks and rows of this process."""
        return self.source.counters()

    def close(self) -> None:
        """Stop the threads and unmap the shards; batches already handed out stay valid."""
        self._closed = True
        self.source.stop()
        for pool in (self._readers, self._openers):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()
        self._windows.clear()
        self.source.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _assemble(self, step: int) -> Batch:
        epoch, epoch_step = self.plan.locate(step)
        share = self.plan.rows_per_lane_step
        count = len(self.lanes) * share
        if self.pin:
            # The caching host allocator reuses pinned memory and knows about copies still in flight; our pool does not.
            tensor = torch.empty((count, self.manifest.width), dtype=TORCH_DTYPES[self.manifest.dtype], pin_memory=True)
            acts = (tensor.view(torch.uint16) if self.manifest.dtype == "bfloat16" else tensor).numpy()
        else:
            acts = self._buffers.take()
            tensor = from_stored(acts, self.manifest.dtype)
        columns = np.empty((4 + self.manifest.concepts_per_row, count), dtype=np.int64)
        first = epoch_step * share
        for place, lane in enumerate(self.lanes):
            for window in self.plan.windows_of(epoch, lane, first, first + share):
                opened = self._open(epoch, lane, window, first)
                shift = place * share + window.start - first
                a, b = max(first, window.start) - window.start, min(first + share, window.stop) - window.start
                columns[:, a + shift : b + shift] = opened.columns[:, a:b]
                step_here = epoch_step - window.start // share
                r, end = opened.first_run[step_here], opened.first_run[step_here + 1]
                edges = opened.edges[r : end + 1]
                for low, high, take in zip(edges, edges[1:], opened.takes[r:end], strict=False):
                    # mode "clip" writes straight into `out`; "raise" would go through a buffer. Indices are in range.
                    take(opened.within[low:high], 0, acts[low + shift : high + shift], "clip")
        row_ids, answer, valid, outlier = torch.from_numpy(columns[:4])
        concept = torch.from_numpy(np.ascontiguousarray(columns[4:].T))
        batch = Batch(tensor, concept, answer, row_ids, self._positions, valid.bool(), outlier.bool(), step)
        return batch.pin() if self.pin else batch

    def _open(self, epoch: int, lane: int, window: Window, first: int) -> _Window:
        """The opened window, shared by the threads that need it.

        first: the lane's first row of the step that asks. The step in which a window begins (or the first one after a
        start in its middle) also has the lane's next window opened in the background.
        """
        future = self._windows.get((epoch, lane, window.number))
        if future is not None and future.done() and window.start < first:
            return future.result()
        future, mine = self._claim(epoch, lane, window)
        if self._openers is not None:
            self._open_next(epoch, lane, window)
        if mine:
            self._fill(future, epoch, lane, window)
        return future.result()

    def _claim(self, epoch: int, lane: int, window: Window) -> tuple["Future[_Window]", bool]:
        """The future of a window, and whether the caller is the one to fill it."""
        name = (epoch, lane, window.number)
        with self._lock:
            future = self._windows.get(name)
            if future is not None:
                return future, False
            future = self._windows[name] = Future()
            if len(self._windows) > 4 * len(self.lanes):
                del self._windows[next(iter(self._windows))]
            return future, True

    def _fill(self, future: "Future[_Window]", epoch: int, lane: int, window: Window) -> None:
        try:
            opened = self._build(epoch, lane, window)
        except BaseException as error:
            future.set_exception(error)
            return
        future.set_result(opened)

    def _open_next(self, epoch: int, lane: int, window: Window) -> None:
        if window.stop < self.plan.rows_per_lane:
            following = self.plan.windows_of(epoch, lane, window.stop, window.stop + 1)[0]
        else:
            epoch += 1
            following = self.plan.windows_of(epoch, lane, 0, 1)[0]
        future, mine = self._claim(epoch, lane, following)
        if mine and self._openers is not None:
            self._openers.submit(self._fill, future, epoch, lane, following)

    def _build(self, epoch: int, lane: int, window: Window) -> _Window:
        rows = self.plan.window_rows(epoch, lane, window)
        starts = self.plan.block_starts
        numbers = np.searchsorted(starts, rows, side="right") - 1
        within = rows - starts[numbers]
        blocks = self.source.many(np.unique(numbers).tolist())
        ordered = [blocks[number] for number in sorted(blocks)]
        first_rows = np.cumsum([0, *(len(block.valid) for block in ordered)])
        place = first_rows[np.searchsorted(sorted(blocks), numbers)] + within
        concepts = self._concepts(ordered)
        columns = np.empty((4 + concepts.shape[1], len(rows)), dtype=np.int64)
        columns[0] = rows
        for column, name in zip(columns[1:4], ("answer", "valid", "outlier"), strict=True):
            column[:] = np.concatenate([getattr(block, name) for block in ordered])[place]
        columns[4:] = concepts[place].T
        share = self.plan.rows_per_lane_step
        step = np.arange(window.start, window.stop) // share - window.start // share
        new_run = np.flatnonzero((np.diff(numbers, prepend=-1) != 0) | (np.diff(step, prepend=-1) != 0))
        takes = {number: block.acts.take for number, block in blocks.items()}
        return _Window(
            columns,
            within,
            edges=[*new_run.tolist(), len(rows)],
            takes=[takes[number] for number in numbers[new_run].tolist()],
            first_run=np.searchsorted(step[new_run], np.arange(step[-1] + 2)).tolist(),
        )

    def _concepts(self, blocks: list[BlockRows]) -> np.ndarray:
        """Labels int32 [n, M] of the rows of these blocks, as training is to take them."""
        labels = np.concatenate([widened(block.concept, self.manifest.concepts_per_row) for block in blocks])
        return labels if self.config.unlabelled == "unknown" else unknown_as_none(labels)
