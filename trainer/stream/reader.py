"""The stream: batches of this rank for consecutive global steps, read ahead by threads."""

import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.stream.config import DataConfig
from trainer.stream.manifest import STORED_DTYPES, Manifest
from trainer.stream.plan import Order
from trainer.stream.shards import TORCH_DTYPES, from_stored
from trainer.stream.sources import SINGLE, Sources
from trainer.stream.windows import COLUMNS, Windows


@dataclass
class Batch:
    """B rows of one rank and one global step.

    acts [B, D] in the dtype of the shards; concept int64 [B, M], see trainer.labels, with one M for the data set;
    answer int64 [B], -1 for none; row_ids int64 [B], unique over the data sets; positions int64 [B], place in the
    global batch (lane * G/L + i); valid bool [B], False for masked rows (damaged, not finite or outlier), which must
    weigh nothing; outlier bool [B], masked for its norm (data.max_norm); step, the global step.
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

    def kept(self) -> "Batch":
        """The batch without its masked rows; in page-locked memory where this one is."""
        if bool(self.valid.all()):
            return self
        left = self._each(lambda tensor: tensor[self.valid])
        return left.pin() if self.acts.is_pinned() else left

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device))


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


class Stream:
    """Iterator of Batch for the global steps start_step, start_step + 1, ...; it never ends.

    data: the one data set, or all that are mixed. plan: their order. lanes: the run of lanes that this rank owns
    (`lanes_of_rank`). The batches depend on data, plan and lanes alone, not on threads or timing. With `pin` batches
    arrive in page-locked memory. Raises DataError for damage beyond the budgets.
    """

    def __init__(
        self,
        config: DataConfig,
        data: Manifest | Sources,
        plan: Order,
        lanes: range,
        start_step: int = 0,
        *,
        pin: bool = False,
    ):
        data = data if isinstance(data, Sources) else Sources({SINGLE: data})
        self.config, self.manifest, self.plan, self.lanes, self.pin = config, data.manifest, plan, lanes, pin
        self.step = start_step  # the next step that is handed out
        self.stall_seconds = 0.0
        self._ahead = 2 * config.threads
        share = plan.rows_per_lane_step
        shape = (len(lanes) * share, self.manifest.width)
        self._buffers = _Buffers(shape, STORED_DTYPES[self.manifest.dtype], keep=self._ahead + 2)
        self._positions = torch.arange(lanes.start * share, lanes.stop * share)
        self._queue: deque[Future[Batch]] = deque()
        self._readers = ThreadPoolExecutor(config.threads, "reader") if config.threads else None
        self._openers = ThreadPoolExecutor(config.threads, "opener") if config.threads else None
        self.sources = [data.open(name, config) for name in data.manifests]
        self._windows = [
            Windows(source, data, number, plan, len(lanes), self._openers) for number, source in enumerate(self.sources)
        ]
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
        each = [source.counters() for source in self.sources]
        return {name: sum(counters[name] for counters in each) for name in each[0]}

    def close(self) -> None:
        """Stop the threads and unmap the shards; batches already handed out stay valid."""
        self._closed = True
        for source in self.sources:
            source.stop()
        for pool in (self._readers, self._openers):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()
        for windows in self._windows:
            windows.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _assemble(self, step: int) -> Batch:
        share = self.plan.rows_per_lane_step
        count = len(self.lanes) * share
        if self.pin:
            # The caching host allocator reuses pinned memory and knows about copies still in flight; our pool does not.
            tensor = torch.empty((count, self.manifest.width), dtype=TORCH_DTYPES[self.manifest.dtype], pin_memory=True)
            acts = (tensor.view(torch.uint16) if self.manifest.dtype == "bfloat16" else tensor).numpy()
        else:
            acts = self._buffers.take()
            tensor = from_stored(acts, self.manifest.dtype)
        columns = np.empty((COLUMNS + self.manifest.concepts_per_row, count), dtype=np.int64)
        before = 0  # rows of the parts before, in a lane
        for part in self.plan.parts(step):
            for place, lane in enumerate(self.lanes):
                self._windows[part.source].copy(part, lane, acts, columns, place * share + before)
            before += part.share
        row_ids, answer, valid, outlier = torch.from_numpy(columns[:COLUMNS])
        concept = torch.from_numpy(np.ascontiguousarray(columns[COLUMNS:].T))
        batch = Batch(tensor, concept, answer, row_ids, self._positions, valid.bool(), outlier.bool(), step)
        return batch.pin() if self.pin else batch
