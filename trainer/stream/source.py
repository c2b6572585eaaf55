"""Blocks of rows as arrays: memory-mapped, checked once per file, masked when damaged within a budget."""

import logging
import threading
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from trainer.errors import DataError
from trainer.labels import UNKNOWN
from trainer.redact import redact
from trainer.stream.attempts import Deadline, Final, Unreachable, retried
from trainer.stream.blocks import (
    BlockRows,
    FileIdentity,
    check_extent,
    map_identified,
    nonfinite_rows,
    open_block,
    origin_of,
)
from trainer.stream.cache import RemoteExtents
from trainer.stream.config import DataConfig
from trainer.stream.location import check_allowed, is_remote, join, local_path
from trainer.stream.manifest import Block, Manifest
from trainer.stream.shards import row_norms, to_stored

log = logging.getLogger(__name__)
_MAPS = 128  # shards mapped at a time; a map holds a file descriptor


class Extents(Protocol):
    """Where the bytes of a block come from."""

    def read(self, shard: int, block: Block, deadline: Deadline, fresh: bool) -> tuple[np.ndarray, FileIdentity]:
        """uint8 [block.bytes], and which file they are of; `fresh` drops whatever copy was read before.

        Raises DataError when it cannot.
        """
        ...

    def close(self) -> None: ...


class LocalExtents:
    """Blocks of local shards by memory map.

    Shards that are missing or of another size than the manifest says are reported at once: as DataError when `strict`,
    else as warnings, and then their blocks fail one by one when they are read.
    """

    def __init__(self, manifest: Manifest, folder: str, strict: bool):
        self.manifest, self.folder = manifest, local_path(folder)
        self._maps: OrderedDict[int, tuple[np.ndarray, FileIdentity]] = OrderedDict()
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

    def read(self, shard: int, block: Block, deadline: Deadline, fresh: bool) -> tuple[np.ndarray, FileIdentity]:
        with self._lock:
            if fresh:
                self._maps.pop(shard, None)
            mapped = self._maps.get(shard)
            if mapped is None:
                mapped = self._maps[shard] = map_identified(self.folder / self.manifest.shards[shard].name)
                while len(self._maps) > _MAPS:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(shard)
        data, identity = mapped
        if len(data) < block.offset + block.bytes:
            raise DataError(f"shard is truncated at byte {len(data)}")
        return data[block.offset : block.offset + block.bytes], identity

    def close(self) -> None:
        self._maps.clear()


class _Checked(NamedTuple):
    """What the checks of a block found, and of which file."""

    identity: FileIdentity
    bad: np.ndarray | None  # rows that are not finite; None: all are


class BlockSource:
    """Checked blocks of a data set by number. Thread-safe.

    A block that stays damaged after `retries` fresh reads is masked while the quarantine budget lasts (valid False,
    labels -1, activations = mean), rows with NaN or infinity likewise within theirs; otherwise DataError names shard,
    block and byte.
    """

    def __init__(self, config: DataConfig, manifest: Manifest):
        self.config, self.manifest = config, manifest
        for index, (_, block) in enumerate(manifest.blocks):
            try:
                check_extent(block, manifest.width, manifest.dtype)
            except DataError as error:
                raise DataError(
                    f"{self.where(index)} {error}; write the manifest again with `alignsae index`"
                ) from None
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
        self._checked: dict[int, _Checked] = {}
        self._most_norm = manifest.most_norm(config.max_norm)
        self._outliers: dict[int, tuple[FileIdentity, np.ndarray]] = {}
        self._stop = threading.Event()
        self._lost = ""  # why the server was given up
        self._lock = threading.Lock()
        self.mean = to_stored(np.asarray(manifest.mean), manifest.dtype)  # what a masked row holds

    def rows(self, index: int) -> BlockRows:
        """The block with that number in manifest order."""
        shard, block = self.manifest.blocks[index]
        if index in self.quarantined:
            return self._masked(block)
        damaged = False

        def attempt(deadline: Deadline) -> BlockRows:
            nonlocal damaged
            try:
                return self._read(index, shard, block, deadline, fresh=damaged)
            except (Unreachable, Final):
                raise
            except DataError:
                damaged = True
                with self._lock:
                    self.reread += 1
                raise

        # A local file is there or is not: no pause between attempts.
        timeout = self.config.timeout if self._downloaders else 0.0
        try:
            return retried(attempt, self.config.retries, timeout, self._stop)
        except _BudgetSpent:
            raise
        except DataError as error:
            return self._quarantine(index, block, error)

    def origin(self, index: int) -> np.ndarray | None:
        """Where the rows of a block come from, int32 [n, 3]: token id, document, position; None where the shard does
        not say. Raises DataError when the bytes cannot be read or are not that."""
        shard, block = self.manifest.blocks[index]
        data, _ = self.extents.read(shard, block, Deadline(self.config.timeout, self._stop), fresh=False)
        return origin_of(data, block, self.where(index))

    def stop(self) -> None:
        """Let reads that are waiting for a server fail soon; further ones fail at once."""
        self._stop.set()

    def many(self, indices: list[int]) -> dict[int, BlockRows]:
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

    def _read(self, index: int, shard: int, block: Block, deadline: Deadline, fresh: bool) -> BlockRows:
        data, identity = self.extents.read(shard, block, deadline, fresh)
        known = self._checked.get(index)
        unchecked = self.config.check and (known is None or known.identity != identity)
        if unchecked and zlib.crc32(data.data) != block.crc32:
            raise DataError("bytes do not match crc32")
        manifest = self.manifest
        sizes = (manifest.width, manifest.dtype, len(manifest.concepts), len(manifest.answers))
        rows = open_block(data, block, *sizes, manifest.concepts_per_row)
        if unchecked:
            self._note(index, identity, nonfinite_rows(rows.acts, manifest.dtype))
        known = self._checked.get(index)
        if known is not None and known.bad is not None:
            bad = known.bad
            rows = BlockRows(*(array.copy() for array in rows))
            rows.acts[bad], rows.concept[bad], rows.answer[bad], rows.valid[bad] = self.mean, UNKNOWN, -1, False
        return self._without_outliers(index, identity, rows)

    def _without_outliers(self, index: int, identity: FileIdentity, rows: BlockRows) -> BlockRows:
        """The rows, those with giant norms marked as not valid. Which they are is found once per file."""
        if self._most_norm is None:
            return rows
        seen = self._outliers.get(index)
        if seen is None or seen[0] != identity:
            norms = row_norms(rows.acts, self.manifest.dtype)
            seen = self._outliers[index] = (identity, np.flatnonzero(norms > self._most_norm))
        if not len(seen[1]):
            return rows
        outlier = rows.outlier.copy()
        outlier[seen[1]] = rows.valid[seen[1]]
        return rows._replace(valid=rows.valid & ~outlier, outlier=outlier)

    def _note(self, index: int, identity: FileIdentity, bad: np.ndarray | None) -> None:
        """Remember that a block was checked, and count its rows that are not finite against the budget, once.

        A block beyond the budget is not remembered: whichever thread comes next must fail too instead of masking it.
        """
        with self._lock:
            again = index in self._checked  # of another file with the same crc32, or by another thread
            total = self.nonfinite_rows + (0 if bad is None or again else len(bad))
            spent = total > self.nonfinite_rows and total > self.config.nonfinite_budget
            if not spent:
                self._checked[index], self.nonfinite_rows = _Checked(identity, bad), total
        if bad is None or again:
            return
        first = int(self.manifest.block_rows[:index].sum()) + int(bad[0])
        message = f"{self.where(index)}: {len(bad)} rows hold NaN or infinity, first row id {first}"
        if spent:
            raise _BudgetSpent(
                f"{message}; {total} exceed data.nonfinite_budget={self.config.nonfinite_budget}, "
                "extract again or raise the budget"
            )
        log.warning("%s; masked", message)

    def _quarantine(self, index: int, block: Block, problem: DataError) -> BlockRows:
        message = f"{self.where(index)}: {problem}"
        unreachable = isinstance(problem, Unreachable)
        with self._lock:
            if unreachable and self._stop.is_set():  # says nothing about the block
                raise _BudgetSpent(self._lost or message) from None
            count = len(self.quarantined | {index})
            spent = count > self.config.quarantine_budget
            if not spent:
                self.quarantined.add(index)
            elif unreachable:
                self._lost = message
        if spent and unreachable:
            self.stop()  # no other thread need wait as long to say the same
            raise _BudgetSpent(message) from None
        if spent:
            raise _BudgetSpent(
                f"{message}; {count} damaged blocks exceed data.quarantine_budget={self.config.quarantine_budget}, "
                "restore the shard (`alignsae verify` lists all damage) or raise the budget"
            ) from None
        log.warning("%s; its %d rows are masked", message, block.rows)
        return self._masked(block)

    def _masked(self, block: Block) -> BlockRows:
        none = np.full(block.rows, -1, dtype=np.int32)
        unknown = np.full((block.rows, 1), UNKNOWN, dtype=np.int32)
        acts = np.broadcast_to(self.mean, (block.rows, self.manifest.width))
        no = np.zeros(block.rows, dtype=bool)
        return BlockRows(np.ascontiguousarray(acts), unknown, none, no, no)

    def close(self) -> None:
        """Stop downloading and unmap the shards."""
        self.stop()
        if self._downloaders is not None:
            self._downloaders.shutdown(wait=True, cancel_futures=True)
        self.extents.close()


class _BudgetSpent(Final):
    """Damage beyond the budget; not worth another attempt."""
