"""Blocks of rows as arrays: memory-mapped, checked at first use, masked when damaged within a budget."""

import logging
import threading
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from trainer.errors import DataError
from trainer.stream.blocks import Rows, map_file, nonfinite_rows, open_block
from trainer.stream.cache import RemoteExtents
from trainer.stream.config import DataConfig
from trainer.stream.location import is_remote, join, local_path, redact
from trainer.stream.manifest import Block, Manifest
from trainer.stream.remote import check_allowed
from trainer.stream.shards import to_stored

log = logging.getLogger(__name__)
_MAPS = 128  # shards mapped at a time; a map holds a file descriptor


class Extents(Protocol):
    """Where the bytes of a block come from."""

    def read(self, shard: int, block: Block, fresh: bool) -> np.ndarray:
        """uint8 [block.bytes]; `fresh` drops whatever copy was read before. Raises DataError when it cannot."""
        ...

    def close(self) -> None: ...


class LocalExtents:
    """Blocks of local shards by memory map.

    Shards that are missing or of another size than the manifest says are reported at once: as DataError when `strict`, else as
    warnings, and then their blocks fail one by one when they are read.
    """

    def __init__(self, manifest: Manifest, folder: str, strict: bool):
        self.manifest, self.folder = manifest, local_path(folder)
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        for shard in manifest.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
                problem = "" if size == shard.bytes else f"has {size} bytes, the manifest says {shard.bytes}"
            except OSError as error:
                problem = f"cannot be read ({error.strerror})"
            if problem and strict:
                raise DataError(f"{path}: {problem}; restore it, or allow damage with data.quarantine_budget")
            if problem:
                log.warning("%s: %s", path, problem)

    def read(self, shard: int, block: Block, fresh: bool) -> np.ndarray:
        with self._lock:
            if fresh:
                self._maps.pop(shard, None)
            mapped = self._maps.get(shard)
            if mapped is None:
                mapped = self._maps[shard] = map_file(self.folder / self.manifest.shards[shard].name)
                while len(self._maps) > _MAPS:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(shard)
        if len(mapped) < block.offset + block.bytes:
            raise DataError(f"shard is truncated at byte {len(mapped)}")
        return mapped[block.offset : block.offset + block.bytes]

    def close(self) -> None:
        self._maps.clear()


class BlockSource:
    """Checked blocks of a data set by number. Thread-safe.

    A block that stays damaged after `retries` fresh reads is masked while the quarantine budget lasts (valid False, labels -1,
    activations = mean), rows with NaN or infinity likewise within theirs; otherwise DataError names shard, block and byte.
    """

    def __init__(self, config: DataConfig, manifest: Manifest):
        self.config, self.manifest = config, manifest
        self.extents: Extents
        self._downloaders: ThreadPoolExecutor | None = None
        if is_remote(config.shards):
            check_allowed(config.shards, config.allow_pipe)
            self.extents = RemoteExtents(manifest, config)
            self._downloaders = ThreadPoolExecutor(config.download_threads, "download")
        else:
            self.extents = LocalExtents(manifest, config.shards, strict=not config.quarantine_budget)
        self.quarantined: set[int] = set()
        self.nonfinite_rows = 0
        self.reread = 0
        self._checked: dict[int, np.ndarray | None] = {}  # block -> rows that are not finite (None: all are)
        self._lock = threading.Lock()
        self.mean = to_stored(np.asarray(manifest.mean), manifest.dtype)  # what a masked row holds

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
        return self._quarantine(index, block, problem)

    def many(self, indices: list[int]) -> dict[int, Rows]:
        """Several blocks by number; remote ones are downloaded side by side."""
        if self._downloaders is None:
            return {index: self.rows(index) for index in indices}
        return dict(zip(indices, self._downloaders.map(self.rows, indices), strict=True))

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
        manifest = self.manifest
        rows = open_block(data, block, manifest.width, manifest.dtype, len(manifest.concepts), len(manifest.answers))
        if first_use:
            self._note(index, nonfinite_rows(rows.acts, manifest.dtype))
        bad = self._checked.get(index)
        if bad is not None:
            rows = Rows(*(array.copy() for array in rows))
            rows.acts[bad], rows.concept[bad], rows.answer[bad], rows.valid[bad] = self.mean, -1, -1, False
        return rows

    def _note(self, index: int, bad: np.ndarray | None) -> None:
        """Remember that a block was checked, and count its rows that are not finite against the budget.

        A block beyond the budget is not remembered: whichever thread comes next must fail too instead of masking it.
        """
        with self._lock:
            total = self.nonfinite_rows + (0 if bad is None else len(bad))
            spent = bad is not None and index not in self._checked and total > self.config.nonfinite_budget
            if not spent and index not in self._checked:
                self._checked[index], self.nonfinite_rows = bad, total
        if bad is None:
            return
        first = int(self.manifest.block_rows[:index].sum()) + int(bad[0])
        message = f"{self.where(index)}: {len(bad)} rows hold NaN or infinity, first row id {first}"
        if spent:
            raise _BudgetSpent(
                f"{message}; {total} exceed data.nonfinite_budget={self.config.nonfinite_budget}, "
                "extract again or raise the budget"
            )
        log.warning("%s; masked", message)

    def _quarantine(self, index: int, block: Block, problem: str) -> Rows:
        with self._lock:
            count = len(self.quarantined | {index})
            spent = count > self.config.quarantine_budget
            if not spent:
                self.quarantined.add(index)
        message = f"{self.where(index)}: {problem}"
        if spent:
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
        """Stop downloading and unmap the shards."""
        if self._downloaders is not None:
            self._downloaders.shutdown(wait=True, cancel_futures=True)
        self.extents.close()


class _BudgetSpent(DataError):
    """Damage beyond the budget; not worth another attempt."""
