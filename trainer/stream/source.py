"""Blocks of rows as arrays: memory-mapped, checked at first use, masked when damaged within a budget."""

import logging
import mmap
import threading
import zlib
from collections import OrderedDict
from typing import NamedTuple, Protocol

import numpy as np

from trainer.errors import DataError
from trainer.stream import npy
from trainer.stream.config import DataConfig
from trainer.stream.location import is_remote, join, local_path, redact
from trainer.stream.manifest import STORED_DTYPES, Block, Manifest

log = logging.getLogger(__name__)
# Smallest bit patterns of infinity and NaN, read as a signed integer and, for negative values, as an unsigned one.
_NONFINITE = {
    "float16": (np.int16, 0x7C00, np.uint16, 0xFC00),
    "bfloat16": (np.int16, 0x7F80, np.uint16, 0xFF80),
    "float32": (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}
_CHUNK = 1 << 18  # bytes checked at a time: crc and finiteness then read the same cache lines
_MAPS = 128  # shards mapped at a time; a map holds a file descriptor


class Rows(NamedTuple):
    """One block: acts [n, D] as stored, concept and answer int32 [n], valid bool [n]."""

    acts: np.ndarray
    concept: np.ndarray
    answer: np.ndarray
    valid: np.ndarray


class Extents(Protocol):
    """Where the bytes of a block come from."""

    def read(self, shard: int, block: Block, fresh: bool) -> np.ndarray:
        """uint8 [block.bytes]; `fresh` drops whatever copy was read before. Raises DataError when it cannot."""
        ...

    def close(self) -> None: ...


class LocalExtents:
    """Blocks of local shards by memory map."""

    def __init__(self, manifest: Manifest, folder: str):
        self.manifest, self.folder = manifest, local_path(folder)
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        for shard in manifest.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except OSError as error:
                log.warning("%s: %s", path, error.strerror)
                continue
            if size != shard.bytes:
                log.warning("%s: has %d bytes, the manifest says %d", path, size, shard.bytes)

    def read(self, shard: int, block: Block, fresh: bool) -> np.ndarray:
        with self._lock:
            if fresh:
                self._maps.pop(shard, None)
            mapped = self._maps.get(shard)
            if mapped is None:
                mapped = self._maps[shard] = self._map(shard)
                while len(self._maps) > _MAPS:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(shard)
        if len(mapped) < block.offset + block.bytes:
            raise DataError(f"shard is truncated at byte {len(mapped)}")
        return mapped[block.offset : block.offset + block.bytes]

    def _map(self, shard: int) -> np.ndarray:
        path = self.folder / self.manifest.shards[shard].name
        try:
            with path.open("rb") as file:
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise DataError(f"shard cannot be read ({getattr(error, 'strerror', None) or 'it is empty'})") from None

    def close(self) -> None:
        self._maps.clear()


class BlockSource:
    """Checked blocks of a data set by number. Thread-safe.

    A block that stays damaged after `retries` fresh reads is masked while the quarantine budget lasts (valid False, labels -1,
    activations = mean), rows with NaN or infinity likewise within theirs; otherwise DataError names shard, block and byte.
    """

    def __init__(self, config: DataConfig, manifest: Manifest, extents: Extents | None = None):
        self.config, self.manifest = config, manifest
        if extents is None:
            if is_remote(config.shards):
                raise DataError(f"{redact(config.shards)}: remote shards are not readable here")
            extents = LocalExtents(manifest, config.shards)
        self.extents = extents
        self.quarantined: set[int] = set()
        self.nonfinite_rows = 0
        self.reread = 0
        self._checked: dict[int, np.ndarray | None] = {}  # block -> rows that are not finite (None: all are)
        self._lock = threading.Lock()
        mean = np.asarray(manifest.mean, dtype=np.float32)
        from trainer.stream.shards import to_stored

        self.mean = to_stored(mean, manifest.dtype)

    def rows(self, index: int) -> Rows:
        """The block with that number in manifest order."""
        shard, block = self.manifest.blocks[index]
        if index in self.quarantined:
            return self._masked(block)
        problem = ""
        for attempt in range(1 + self.config.retries):
            try:
                return self._read(index, shard, block, fresh=attempt > 0)
            except _BudgetSpent:
                raise
            except DataError as error:
                problem = str(error)
                with self._lock:
                    self.reread += 1
        return self._quarantine(index, shard, block, problem)

    def where(self, index: int) -> str:
        """Shard, block and byte offset, for messages."""
        shard, block = self.manifest.blocks[index]
        name = redact(join(self.config.shards, self.manifest.shards[shard].name))
        return f"{name}: block {block.key} at byte {block.offset}"

    def counters(self) -> dict[str, int]:
        """Masked blocks and rows of this process so far, for the log, the checkpoint and the summary."""
        rows = sum(self.manifest.blocks[i][1].rows for i in self.quarantined)
        return {
            "quarantined_blocks": len(self.quarantined), "quarantined_rows": rows,
            "nonfinite_rows": self.nonfinite_rows, "reread_blocks": self.reread,
        }  # fmt: skip

    def _read(self, index: int, shard: int, block: Block, fresh: bool) -> Rows:
        data = self.extents.read(shard, block, fresh)
        first_use = self.config.check and index not in self._checked
        if first_use and zlib.crc32(data.data) != block.crc32:
            raise DataError("bytes do not match crc32")
        acts = self._payload(data, block, "acts")
        if acts.shape != (block.rows, self.manifest.width) or acts.dtype != STORED_DTYPES[self.manifest.dtype]:
            raise DataError(
                f"activations are {acts.dtype} {acts.shape}, "
                f"the manifest says {self.manifest.dtype} ({block.rows}, {self.manifest.width})"
            )
        concept = self._labels(data, block, "concept", len(self.manifest.concepts))
        answer = self._labels(data, block, "answer", len(self.manifest.answers))
        if first_use:
            self._note(index, nonfinite_rows(acts, self.manifest.dtype))
        valid = np.ones(block.rows, dtype=bool)
        bad = self._checked.get(index)
        if bad is not None:
            acts, concept, answer = acts.copy(), concept.copy(), answer.copy()
            acts[bad], concept[bad], answer[bad], valid[bad] = self.mean, -1, -1, False
        return Rows(acts, concept, answer, valid)

    def _payload(self, data: np.ndarray, block: Block, name: str) -> np.ndarray:
        start, size = getattr(block, name)
        return npy.view(data[start - block.offset : start - block.offset + size], name)

    def _labels(self, data: np.ndarray, block: Block, name: str, size: int) -> np.ndarray:
        if getattr(block, name) is None:
            return np.full(block.rows, -1, dtype=np.int32)
        labels = self._payload(data, block, name)
        if labels.shape != (block.rows,) or labels.dtype.kind != "i":
            raise DataError(f"{name} is {labels.dtype} {labels.shape}, not one integer per row")
        if labels.min() < -1 or labels.max() >= size:
            raise DataError(f"a {name} label is outside -1..{size - 1}")
        return labels.astype(np.int32, copy=False)

    def _note(self, index: int, bad: np.ndarray | None) -> None:
        """Remember that a block was checked, and count its rows that are not finite against the budget."""
        with self._lock:
            if index in self._checked:
                return
            self._checked[index] = bad
            if bad is None:
                return
            self.nonfinite_rows += len(bad)
            total = self.nonfinite_rows
        first = int(self.manifest.block_rows[:index].sum()) + int(bad[0])
        message = f"{self.where(index)}: {len(bad)} rows hold NaN or infinity, first row id {first}"
        if total > self.config.nonfinite_budget:
            raise _BudgetSpent(
                f"{message}; {total} exceed data.nonfinite_budget={self.config.nonfinite_budget}, "
                "extract again or raise the budget"
            )
        log.warning("%s; masked", message)

    def _quarantine(self, index: int, shard: int, block: Block, problem: str) -> Rows:
        with self._lock:
            self.quarantined.add(index)
            count = len(self.quarantined)
        message = f"{self.where(index)}: {problem}"
        if count > self.config.quarantine_budget:
            raise _BudgetSpent(
                f"{message}; {count} damaged blocks exceed data.quarantine_budget={self.config.quarantine_budget}, "
                "restore the shard (`alignsae verify` lists all damage) or raise the budget"
            )
        log.warning("%s; its %d rows are masked", message, block.rows)
        return self._masked(block)

    def _masked(self, block: Block) -> Rows:
        none = np.full(block.rows, -1, dtype=np.int32)
        acts = np.broadcast_to(self.mean, (block.rows, self.manifest.width))
        return Rows(np.ascontiguousarray(acts), none, none, np.zeros(block.rows, dtype=bool))

    def close(self) -> None:
        self.extents.close()


class _BudgetSpent(DataError):
    """Damage beyond the budget; not worth another attempt."""


def nonfinite_rows(acts: np.ndarray, dtype: str) -> np.ndarray | None:
    """Indices of rows of acts [n, D] (as stored) with NaN or infinity; None when there are none."""
    signed, high, unsigned, low = _NONFINITE[dtype]
    flat = acts.reshape(-1)
    step = _CHUNK // acts.itemsize
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        if part.view(signed).max() >= high or part.view(unsigned).max() >= low:
            bits = acts.view(unsigned)
            return np.flatnonzero(((bits & high) == high).any(axis=1))
    return None
