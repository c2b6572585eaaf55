"""Safetensors files that are laid out in memory and written past the page cache.

A snapshot is copied straight into the layout of its file, hashed there, and written by direct I/O, so that a save takes
almost no CPU time from training: through the page cache the kernel copies every byte, and hashing from the file reads
it again (docs/faults.md, "Measured").
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

# Direct I/O wants memory, file offset and length in whole blocks; no file system in use has larger ones.
BLOCK = 4096
PIECE = 32 << 20
METADATA = 256  # bytes of the header that are left for it and its brackets
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


class TensorFile:
    """Content of one safetensors file in block-aligned host memory.

    Args:
        tensors: name -> tensor (fp32, bf16 or int64) whose value is copied.
        pinned: page-locked memory, which a CUDA device fills at full speed.

    `tensors` are views of that memory: what is copied into them is what `write` writes.
    """

    def __init__(self, tensors: Mapping[str, Tensor], pinned: bool = False):
        # Widest first: every tensor then starts at a multiple of its item size.
        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        self._entries: dict[str, object] = {}
        end = 0
        for name, t in ordered:
            begin, end = end, end + t.nbytes
            self._entries[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
        self._start = _whole_blocks(len(json.dumps(self._entries)) + METADATA)
        self.size = self._start + end
        room = torch.empty(_whole_blocks(self.size) + BLOCK, dtype=torch.uint8, pin_memory=pinned)
        self._memory = room[-room.data_ptr() % BLOCK :][: _whole_blocks(self.size)]
        self._memory[self.size :] = 0
        self.tensors: dict[str, Tensor] = {}
        begin = self._start
        for name, t in ordered:
            part = self._memory[begin : begin + t.nbytes]
            self.tensors[name] = part.view(t.dtype).view(t.shape).copy_(t.detach())
            begin += t.nbytes

    def write(self, path: Path, metadata: Mapping[str, str]) -> dict[str, int | str]:
        """Write the file and sync it to disk. Returns its size and hash, as `files.seal` does. Raises OSError."""
        header = self._header(metadata)
        if len(header) > self._start:
            raise ValueError(f"{path}: metadata {metadata} is longer than {METADATA} bytes")
        self._memory[: self._start] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        content = self._memory.numpy().data
        try:
            _write(path, content, self.size, getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:  # the answer of a file system without direct I/O
                raise
            _write(path, content, self.size, 0)
        return {"bytes": self.size, "xxh3_128": xxhash.xxh3_128(content[: self.size]).hexdigest()}

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        """Length and JSON text, filled up with spaces to where the tensors start."""
        text = json.dumps({"__metadata__": dict(metadata), **self._entries}).encode()
        return (self._start - 8).to_bytes(8, "little") + text.ljust(self._start - 8)


def _write(path: Path, content: memoryview, size: int, flag: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flag, 0o666)
    try:
        done = 0
        while done < len(content):
            done += os.write(descriptor, content[done : done + PIECE])
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whole_blocks(size: int) -> int:
    return math.ceil(size / BLOCK) * BLOCK
