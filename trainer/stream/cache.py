"""Remote blocks through a bounded folder that all processes of a node share.

Blocks are kept, not shards: an epoch visits blocks in random order, and a cache of whole shards smaller than the data
set would fetch every shard once per block. A file is written under a temporary name, checked against the block's crc32,
fsynced and renamed; its name is a hash of the full URL, the server's ETag and the byte range.
"""

import contextlib
import errno
import hashlib
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from trainer.errors import DataError, UserError
from trainer.redact import redact
from trainer.stream.attempts import Deadline
from trainer.stream.blocks import FileIdentity, map_identified
from trainer.stream.config import DataConfig
from trainer.stream.location import is_pipe, join
from trainer.stream.manifest import Block, Manifest, Shard
from trainer.stream.remote import fetch, version

log = logging.getLogger(__name__)
_STALE_SECONDS = 3600  # a temporary file this old belongs to a process that was killed


class BlockCache:
    """Files of a folder, together at most `limit` bytes; the ones used longest ago go first.

    A file that a process has mapped stays readable for it after eviction.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._unseen = limit  # bytes added since the folder was last measured; the first addition measures
        self._lock = threading.Lock()
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir={folder} cannot be created ({error.strerror}); choose another") from None

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.block"

    def lock(self, key: str) -> FileLock:
        """A lock between threads and processes; keys share 4,096 of them."""
        return FileLock(self.folder / "locks" / key[:3])

    def get(self, key: str, size: int) -> tuple[np.ndarray, FileIdentity] | None:
        """The cached file as uint8 [size], and which file that is; or None. Marks it as used by its access time."""
        path = self.path(key)
        try:
            data, identity = map_identified(path)
            os.utime(path, ns=(time.time_ns(), identity[3]))
        except (DataError, FileNotFoundError):
            return None
        return (data, identity) if len(data) == size else None

    def put(self, key: str, payload: bytes) -> None:
        """Store a file atomically and make room for it first; raises UserError when the disk is full or read-only."""
        path = self.path(key)
        temporary = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            self._reserve(temporary, len(payload))
            with temporary.open("r+b") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            hint = "lower data.cache_bytes" if error.errno == errno.ENOSPC else "choose another data.cache_dir"
            raise UserError(f"{self.folder}: a block cannot be cached ({error.strerror}); {hint}") from None

    def drop(self, key: str) -> None:
        """Forget a file."""
        self.path(key).unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> None:
        """Make room and claim it with a file of that size, which other processes count.

        Measuring a large folder takes longer than a download: it is done once per hundredth of the limit, with a
        margin.
        """
        with self._lock:
            self._unseen += size
            measure = self._unseen >= self.limit // 100
            if measure:
                self._unseen = 0
        with FileLock(self.folder / "locks" / "evict") if measure else contextlib.nullcontext():
            if measure:
                self._evict(size)
            with temporary.open("wb") as file:
                file.truncate(size)

    def _evict(self, size: int) -> None:
        """Remove what was used longest ago until `size` more bytes fit."""
        total, finished = size, []
        for path in self.folder.glob("??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process evicted it
                continue
            if path.suffix == ".block":
                finished.append((status.st_atime, status.st_size, path))
            elif time.time() - status.st_mtime > _STALE_SECONDS:
                path.unlink(missing_ok=True)
                continue
            total += status.st_size
        if total <= self.limit * 0.95:
            return
        for _, length, path in sorted(finished):
            path.unlink(missing_ok=True)
            total -= length
            if total <= self.limit * 0.9:
                return


class RemoteExtents:
    """Blocks of remote shards by byte range, through the cache. A server without ranges is read shard by shard."""

    def __init__(self, manifest: Manifest, config: DataConfig):
        least = (config.download_threads + 2) * max(block.bytes for _, block in manifest.blocks)
        if config.cache_bytes < least:
            raise UserError(
                f"data.cache_bytes={config.cache_bytes} cannot hold the blocks that {config.download_threads} "
                f"data.download_threads fetch at a time; raise it to {least} or more"
            )
        self.manifest, self.url = manifest, config.shards
        self.cache = BlockCache(Path(config.cache_dir).expanduser(), config.cache_bytes)
        self.downloads = 0
        self._ranges = not is_pipe(self.url)
        self._versions: dict[int, str] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, block: Block, deadline: Deadline, fresh: bool) -> tuple[np.ndarray, FileIdentity]:
        """uint8 [block.bytes] of the cached file, and which file that is; `fresh` downloads it again."""
        key = self._key(shard, block, deadline)
        found = None if fresh else self.cache.get(key, block.bytes)
        if found is None and self._ranges:
            with self._held(self.cache.lock(key), shard, deadline):
                if fresh:
                    self.cache.drop(key)
                # Another process may have been faster.
                found = self.cache.get(key, block.bytes) or self._fetch_block(shard, block, key, deadline)
        elif found is None:
            found = self._through_whole_shard(shard, block, key, deadline, fresh)
        if found is None:
            raise DataError("downloaded bytes do not match crc32")
        return found

    def close(self) -> None:
        """Nothing is held open."""

    def _shard_url(self, shard: int) -> str:
        return join(self.url, self.manifest.shards[shard].name)

    @contextlib.contextmanager
    def _held(self, lock: FileLock, shard: int, deadline: Deadline) -> Iterator[None]:
        """Holds a lock; whoever has it may be downloading the same bytes, for as long as the deadline at most."""

        def acquired(seconds: float) -> bool:
            try:
                lock.acquire(timeout=seconds)
            except Timeout:
                return False
            return True

        deadline.wait(acquired, f"{redact(self._shard_url(shard))}: another reader's download")
        try:
            yield
        finally:
            lock.release()

    def _key(self, shard: int, block: Block, deadline: Deadline) -> str:
        url = self._shard_url(shard)
        with self._lock:
            known = self._versions.get(shard)
        if known is None:
            known = version(url, deadline)
            with self._lock:
                self._versions[shard] = known
        return hashlib.sha256(f"{url}\0{known}\0{block.offset}\0{block.bytes}\0{block.crc32}".encode()).hexdigest()

    def _fetch_block(
        self, shard: int, block: Block, key: str, deadline: Deadline
    ) -> tuple[np.ndarray, FileIdentity] | None:
        payload = fetch(self._shard_url(shard), (block.offset, block.offset + block.bytes), deadline)
        with self._lock:
            self.downloads += 1
        whole = self.manifest.shards[shard]
        if len(payload) == whole.bytes != block.bytes:
            self._ranges = False
            log.warning("%s: the server ignores byte ranges, whole shards are read", redact(self.url))
            self._store_shard(shard, whole, payload, block, deadline)
        else:
            self._store(key, block, payload)
        return self.cache.get(key, block.bytes)

    def _store(self, key: str, block: Block, payload: bytes) -> None:
        if len(payload) != block.bytes:
            raise DataError(f"download has {len(payload)} bytes instead of {block.bytes}")
        if zlib.crc32(payload) != block.crc32:
            raise DataError("downloaded bytes do not match crc32")
        self.cache.put(key, payload)

    def _through_whole_shard(
        self, shard: int, block: Block, key: str, deadline: Deadline, fresh: bool
    ) -> tuple[np.ndarray, FileIdentity] | None:
        """The block from a download of its whole shard, of which every other block is kept as well."""
        whole = self.manifest.shards[shard]
        name = hashlib.sha256(self._shard_url(shard).encode()).hexdigest()
        lock = FileLock(self.cache.folder / "locks" / f"shard-{name[:16]}")
        with self._held(lock, shard, deadline):
            if fresh:
                self.cache.drop(key)
            found = self.cache.get(key, block.bytes)
            if found is None:
                payload = fetch(self._shard_url(shard), None, deadline)
                with self._lock:
                    self.downloads += 1
                self._store_shard(shard, whole, payload, block, deadline)
                found = self.cache.get(key, block.bytes)
        return found

    def _store_shard(self, shard: int, whole: Shard, payload: bytes, last: Block, deadline: Deadline) -> None:
        """Keep every undamaged block; `last` is stored last, so that a small cache still holds it."""
        if len(payload) != whole.bytes:
            raise DataError(f"download has {len(payload)} bytes instead of {whole.bytes}")
        for block in sorted(whole.blocks, key=lambda b: b is last):
            part = payload[block.offset : block.offset + block.bytes]
            if zlib.crc32(part) == block.crc32:
                self.cache.put(self._key(shard, block, deadline), part)
