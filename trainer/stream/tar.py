"""Strict USTAR reading over a memory map: every header, size, type and padding byte is checked, nothing is extracted.

Stock readers stop silently at a damaged header, which loses the rest of the shard; this one says where the damage is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trainer.errors import DataError

BLOCK = 512
_ZERO = bytes(BLOCK)
_OCTAL = re.compile(rb"([0-7]{1,11})[ \0]+\Z")
_CHECKSUM = re.compile(rb"([0-7]{6})\0 \Z")
_REFUSED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device", b"6": "a pipe",
    b"L": "a GNU long name", b"K": "a GNU long link", b"S": "a sparse file",
}  # fmt: skip
# Extended headers that stock writers add and that change nothing about the payload.
_HARMLESS = {"mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"}
_MAX_EXTENDED = 1 << 16


class Member(NamedTuple):
    """A regular file of the archive: name, byte of its first header, payload [offset, offset + size), end."""

    name: str
    start: int
    offset: int
    size: int
    end: int


@dataclass
class Sample:
    """Neighbouring members of one webdataset key: bytes [start, end), members by suffix (`acts.npy`)."""

    key: str
    start: int
    end: int
    members: dict[str, Member] = field(default_factory=dict)


def members(data: np.ndarray, where: str) -> Iterator[Member]:
    """Regular members in file order. data: uint8 [bytes]. Raises DataError naming `where` and the byte of damage."""
    position, start, name = 0, None, None
    while True:
        header = data[position : position + BLOCK].tobytes()
        if len(header) < BLOCK:
            raise DataError(f"{where}: cut short at byte {len(data)}, the end-of-archive mark is missing")
        if header == _ZERO:
            _check_end(data, position, where)
            return
        kind, own_name, size = _parse(header, f"{where}: header at byte {position}")
        offset = position + BLOCK
        end = offset + -(-size // BLOCK) * BLOCK
        if end > len(data):
            raise DataError(f"{where}: cut short at byte {len(data)}, {own_name!r:.80} at byte {position} needs {end}")
        if data[offset + size : end].any():
            raise DataError(f"{where}: padding after {own_name!r:.80} at byte {offset + size} is not zero")
        start = position if start is None else start
        if kind in (b"x", b"g"):
            longer = _extended(data[offset : offset + size], f"{where}: extended header at byte {position}")
            name = longer if kind == b"x" else name
        else:
            if kind != b"5":
                yield Member(_safe(name or own_name, f"{where}: member at byte {position}"), start, offset, size, end)
            start, name = None, None
        position = end


def samples(data: np.ndarray, where: str) -> Iterator[Sample]:
    """Members grouped by key as webdataset does: a key ends at the first dot of the last path component."""
    current: Sample | None = None
    for member in members(data, where):
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = folder + slash + stem
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = Sample(key, member.start, member.end)
        elif suffix in current.members:
            raise DataError(f"{where}: sample {key!r:.100} at byte {member.start} has two members .{suffix:.40}")
        current.members[suffix] = member
        current.end = member.end
    if current is not None:
        yield current


def _parse(header: bytes, where: str) -> tuple[bytes, str, int]:
    """(type, name, payload bytes) of a header block."""
    checksum = _CHECKSUM.match(header[148:156])
    if checksum is None or int(checksum[1], 8) != sum(header) - sum(header[148:156]) + 8 * 32:
        raise DataError(f"{where} is damaged (checksum)")
    if header[257:265] not in (b"ustar\x0000", b"ustar  \x00"):
        raise DataError(f"{where} is not USTAR")
    size = _OCTAL.match(header[124:136])
    if size is None:
        raise DataError(f"{where} holds no plain octal size")
    kind = header[156:157]
    if kind in _REFUSED:
        raise DataError(f"{where} is {_REFUSED[kind]}; only regular files are read, write the tar again without it")
    if kind not in (b"0", b"\0", b"5", b"x", b"g"):
        raise DataError(f"{where} has the unknown type {kind!r}")
    if kind == b"5" and int(size[1], 8):
        raise DataError(f"{where} is a folder with a payload")
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    name = b"/".join(part for part in (prefix, header[:100].split(b"\0")[0]) if part)
    return kind, name.decode("ascii", "backslashreplace"), int(size[1], 8)


def _extended(payload: np.ndarray, where: str) -> str | None:
    """The member name of a PAX header, if it gives one; what else would change how members are read is refused."""
    if len(payload) > _MAX_EXTENDED:
        raise DataError(f"{where} has {len(payload)} bytes, more than {_MAX_EXTENDED}")
    rest, name = payload.tobytes(), None
    while rest:
        length = re.match(rb"([1-9][0-9]{0,5}) ", rest)
        record = rest[: int(length[1])] if length else b""
        key, equals, value = record.rstrip(b"\n").partition(b" ")[2].partition(b"=")
        if not equals or len(record) != int(length[1] if length else 0) or not record.endswith(b"\n"):
            raise DataError(f"{where} is damaged")
        if key == b"path":
            name = value.decode("ascii", "backslashreplace")
        elif key.decode("ascii", "backslashreplace") not in _HARMLESS:
            raise DataError(f"{where} sets {key!r:.60}, which is not supported")
        rest = rest[len(record) :]
    return name


def _safe(name: str, where: str) -> str:
    parts = name.split("/")
    if not name or len(name) > 255 or not name.isprintable() or name.startswith("/") or ".." in parts or "\\" in name:
        raise DataError(f"{where} has the unsafe name {name!r:.100}")
    return name


def _check_end(data: np.ndarray, position: int, where: str) -> None:
    if len(data) - position < 2 * BLOCK or len(data) % BLOCK:
        raise DataError(f"{where}: cut short at byte {len(data)}, the end-of-archive mark is incomplete")
    if data[position:].any():
        raise DataError(f"{where}: bytes after the end-of-archive mark at byte {position} are not zero")
