"""Blocks of rows as arrays: checked once per file, masked when damaged within a budget."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from trainer.errors import DataError
from trainer.labels import UNKNOWN
from trainer.stream.attempts import Deadline, Final, Unreachable, retried
from trainer.stream.blocks import BlockRows, FileIdentity, nonfinite_rows
from trainer.stream.config import DataConfig
from trainer.stream.manifest import Manifest
from trainer.stream.shards import row_norms, to_stored
from trainer.stream.stored import StoredBlocks

log = logging.getLogger(__name__)


class Blocks(Protocol):
    """Where the blocks of a data set come from. Thread-safe. side_by_side: how many it is worth to open at once."""

    side_by_side: int

    def open(
        self, index: int, deadline: Deadline, fresh: bool, checked: FileIdentity | None
    ) -> tuple[BlockRows, FileIdentity]:
        """The rows of a block, and which file they are of.

        fresh drops whatever copy was read before. checked: the file of which the block was found whole before.
        Raises DataError when it cannot.
        """
        ...

    def origin(self, index: int, deadline: Deadline) -> np.ndarray | None: ...
    def where(self, index: int) -> str: ...
    def close(self) -> None: ...


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

    def __init__(self, config: DataConfig, manifest: Manifest, blocks: Blocks | None = None):
        self.config, self.manifest = config, manifest
        self.blocks: Blocks = StoredBlocks(config, manifest) if blocks is None else blocks
        side_by_side = self.blocks.side_by_side
        self._downloaders = ThreadPoolExecutor(side_by_side, "download") if side_by_side else None
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
        if index in self.quarantined:
            return self._masked(index)
        damaged = False

        def attempt(deadline: Deadline) -> BlockRows:
            nonlocal damaged
            try:
                return self._read(index, deadline, fresh=damaged)
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
            return self._quarantine(index, error)

    def origin(self, index: int) -> np.ndarray | None:
        """Where the rows of a block come from, int32 [n, 3]: token id, document, position; None where the shard does
        not say. Raises DataError when the bytes cannot be read or are not that."""
        return self.blocks.origin(index, Deadline(self.config.timeout, self._stop))

    def stop(self) -> None:
        """Let reads that are waiting for a server fail soon; further ones fail at once."""
        self._stop.set()

    def many(self, indices: list[int]) -> dict[int, BlockRows]:
        """Several blocks by number; remote ones are downloaded side by side."""
        if self._downloaders is None:
            return {index: self.rows(index) for index in indices}
        return dict(zip(indices, self._downloaders.map(self.rows, indices), strict=True))

    def where(self, index: int) -> str:
        """Which block that is, for messages."""
        return self.blocks.where(index)

    def counters(self) -> dict[str, int]:
        """Masked blocks and rows of this process so far, for the log, the checkpoint and the summary."""
        rows = sum(int(self.manifest.block_rows[i]) for i in self.quarantined)
        return {
            "quarantined_blocks": len(self.quarantined), "quarantined_rows": rows,
            "nonfinite_rows": self.nonfinite_rows, "reread_blocks": self.reread,
        }  # fmt: skip

    def _read(self, index: int, deadline: Deadline, fresh: bool) -> BlockRows:
        known = self._checked.get(index)
        rows, identity = self.blocks.open(index, deadline, fresh, None if known is None else known.identity)
        if self.config.check and (known is None or known.identity != identity):
            self._note(index, identity, nonfinite_rows(rows.acts, self.manifest.dtype))
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

    def _quarantine(self, index: int, problem: DataError) -> BlockRows:
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
        log.warning("%s; its %d rows are masked", message, self.manifest.block_rows[index])
        return self._masked(index)

    def _masked(self, index: int) -> BlockRows:
        rows = int(self.manifest.block_rows[index])
        none = np.full(rows, -1, dtype=np.int32)
        unknown = np.full((rows, 1), UNKNOWN, dtype=np.int32)
        acts = np.broadcast_to(self.mean, (rows, self.manifest.width))
        no = np.zeros(rows, dtype=bool)
        return BlockRows(np.ascontiguousarray(acts), unknown, none, no, no)

    def close(self) -> None:
        """Stop downloading and unmap the shards."""
        self.stop()
        if self._downloaders is not None:
            self._downloaders.shutdown(wait=True, cancel_futures=True)
        self.blocks.close()


class _BudgetSpent(Final):
    """Damage beyond the budget; not worth another attempt."""
