"""Where the bytes of a shard go while it is written."""

import hashlib
import io
import zlib
from typing import BinaryIO


class Sink(io.RawIOBase):
    """A file that hashes what passes through: sha256 of the shard, crc32 since the last `restart`."""

    def __init__(self, file: BinaryIO):
        self.file, self.position, self.crc, self.sha = file, 0, 0, hashlib.sha256()

    def write(self, data) -> int:
        self.file.write(data)
        self.position += len(data)
        self.crc = zlib.crc32(data, self.crc)
        self.sha.update(data)
        return len(data)

    def tell(self) -> int:
        return self.position
