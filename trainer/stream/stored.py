"""Blocks of shards: the bytes of local or remote tars, checked against the manifest, as arrays."""

import logging
import threading
import zlib
from collections import OrderedDict
from typing import Protocol

import numpy as np

from trainer.errors import DataError
from trainer.redact import redact
from trainer.stream.attempts import Deadline
from trainer.stream.blocks import BlockRows, FileIdentity, check_extent, map_identified, open_block, origin_of
from trainer.stream.cache import RemoteExtents
from trainer.stream.config import DataConfig
from trainer.stream.location import check_allowed, is_remote, join, local_path
from trainer.stream.manifest import Block, Manifest

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


class StoredBlocks:
    """Blocks of the shards at config.shards by number. Thread-safe.

    side_by_side: how many it is worth to read at once.
    """

    def __init__(self, config: DataConfig, manifest: Manifest):
        self.config, self.manifest = config, manifest
        manifest.require_shards(redact(config.shards))
        for index, (_, block) in enumerate(manifest.blocks):
            try:
                check_extent(block, manifest.width, manifest.dtype)
            except DataError as error:
                raise DataError(
                    f"{self.where(index)} {error}; write the manifest again with `alignsae index`"
                ) from None
        self.extents: Extents
        self.side_by_side = 0
        if is_remote(config.shards):
            check_allowed(config.shards, config.allow_pipe)
            self.extents = RemoteExtents(manifest, config)
            self.side_by_side = config.download_threads
        else:
            self.extents = LocalExtents(manifest, config.shards, strict=not config.quarantine_budget)

    def open(
        self, index: int, deadline: Deadline, fresh: bool, checked: FileIdentity | None
    ) -> tuple[BlockRows, FileIdentity]:
        """The rows of a block; see source.Blocks."""
        shard, block = self.manifest.blocks[index]
        data, identity = self.extents.read(shard, block, deadline, fresh)
        if self.config.check and checked != identity and zlib.crc32(data.data) != block.crc32:
            raise DataError("bytes do not match crc32")
        manifest = self.manifest
        sizes = (manifest.width, manifest.dtype, len(manifest.concepts), len(manifest.answers))
        return open_block(data, block, *sizes, manifest.concepts_per_row), identity

    def origin(self, index: int, deadline: Deadline) -> np.ndarray | None:
        """Where the rows of a block come from; see BlockSource.origin."""
        shard, block = self.manifest.blocks[index]
        data, _ = self.extents.read(shard, block, deadline, fresh=False)
        return origin_of(data, block, self.where(index))

    def where(self, index: int) -> str:
        """Shard, block and byte offset."""
        shard, block = self.manifest.blocks[index]
        name = redact(join(self.config.shards, self.manifest.shards[shard].name))
        return f"{name}: block {block.key} at byte {block.offset}"

    def close(self) -> None:
        """Unmap the shards."""
        self.extents.close()
