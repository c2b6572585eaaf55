"""manifest.json: what a folder of shards holds, so that no tar is scanned and every byte can be checked.

The digest of the manifest identifies the data set: the epoch order is derived from it and a checkpoint records it.
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import DataError, UserError
from trainer.redact import redact
from trainer.stream.remote import read_file

SCHEMA = 1
FILE_NAME = "manifest.json"
# bfloat16 has no npy type; its bits are stored as unsigned 16-bit integers.
STORED_DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
}
# Keys are webdataset sample keys, which end at the first dot; names are files of the shard folder itself.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,79}\Z")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}\.tar\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")
MAX_WIDTH = 1 << 20
MAX_BYTES = 1 << 48


@dataclass(frozen=True)
class Block:
    """One sample of a shard: `rows` consecutive rows.

    offset, bytes: the sample's extent in the shard, tar headers and padding included; `crc32` covers all of it.
    acts, concept, answer: (offset in the shard, bytes) of the npy payloads; None where a foreign shard has no labels.
    """

    key: str
    rows: int
    offset: int
    bytes: int
    acts: tuple[int, int]
    concept: tuple[int, int] | None
    answer: tuple[int, int] | None
    crc32: int


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, size, sha256 and blocks in file order."""

    name: str
    bytes: int
    sha256: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about one split that a reader must know.

    width: D. dtype: float16, float32 or bfloat16. mean [D] and scale: x = (h - mean) / scale has mean squared norm 1.
    concepts [R] and answers [A] name the label values. extra: free metadata, part of the digest.
    """

    width: int
    dtype: str
    model: str
    hook_point: str
    mean: list[float]
    scale: float
    concepts: list[str]
    answers: list[str]
    rows: int
    shards: tuple[Shard, ...]
    schema: int = SCHEMA
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(own, default=vars, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def blocks(self) -> list[tuple[int, Block]]:
        """(shard index, block) of every block in row order."""
        return [(s, block) for s, shard in enumerate(self.shards) for block in shard.blocks]

    @cached_property
    def block_rows(self) -> np.ndarray:
        """Rows per block, int64 [blocks]."""
        return np.array([block.rows for _, block in self.blocks], dtype=np.int64)

    def save(self, folder: str | Path) -> Path:
        """Write manifest.json into `folder` atomically and return its path."""
        return write_atomically(Path(folder) / FILE_NAME, self.to_json().encode() + b"\n")

    @classmethod
    def load(
        cls, location: str | Path, *, allow_pipe: bool = False, retries: int = 4, timeout: float = 60.0
    ) -> "Manifest":
        """Read and check the manifest of a folder or URL; raises DataError when it is missing, foreign or inconsistent."""
        payload = read_file(str(location), FILE_NAME, allow_pipe=allow_pipe, retries=retries, timeout=timeout)
        return cls.parse(payload, f"{redact(str(location)).rstrip('/')}/{FILE_NAME}")

    @classmethod
    def parse(cls, payload: bytes, where: str) -> "Manifest":
        """Manifest from the bytes of manifest.json; `where` names it in errors."""
        checker = _Checker(where)
        try:
            data = json.loads(payload.decode(), parse_constant=_no_constant)
            manifest = checker.manifest(data)
            manifest.digest  # noqa: B018  # metadata that canonical JSON cannot hold (1e999, deep nesting) fails here
        except (ValueError, RecursionError) as error:
            raise checker.fail(f"not valid JSON ({type(error).__name__})") from None
        return manifest


def write_atomically(path: Path, payload: bytes) -> Path:
    """Write a file under a temporary name, fsync, rename; on any error nothing is left behind."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def read_names(path: Path) -> list[str]:
    """Label names in label order from a JSON list or a text file with one name per line; raises UserError."""
    try:
        text = path.read_text()
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as names ({error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: must hold one name per line, or a JSON list of names")
    if len(set(names)) != len(names):
        raise UserError(f"{path}: repeats a name")
    return names


def _no_constant(word: str) -> float:
    raise ValueError(word)


class _Checker:
    """Turns untrusted JSON into a Manifest; every rule that the reader relies on is checked here once."""

    def __init__(self, where: str):
        self.where = where

    def fail(self, what: str) -> DataError:
        return DataError(f"{self.where}: {what}; write it again with `alignsae index` or fetch a fresh copy")

    def get(self, data: Any, name: str, kind: type) -> Any:
        if not isinstance(data, dict) or name not in data:
            raise self.fail(f"field {name!r} is missing")
        value = data[name]
        # bool is an int in Python but not in this format.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fail(f"field {name!r} must be {kind.__name__}, not {type(value).__name__}")
        return value

    def integer(self, data: Any, name: str, low: int, high: int) -> int:
        value = self.get(data, name, int)
        if not low <= value <= high:
            raise self.fail(f"field {name!r} is outside {low}..{high}")
        return value

    def number(self, value: Any, name: str) -> float:
        # The bound keeps integers of hundreds of digits away from float().
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise self.fail(f"field {name!r} must hold finite numbers")
        return float(value)

    def names(self, data: Any, name: str) -> list[str]:
        values = self.get(data, name, list)
        if not all(isinstance(v, str) for v in values):
            raise self.fail(f"field {name!r} must be a list of strings")
        if len(set(values)) != len(values):
            raise self.fail(f"field {name!r} repeats a name")
        return values

    def manifest(self, data: Any) -> Manifest:
        schema = self.get(data, "schema", int)
        if schema != SCHEMA:
            raise DataError(
                f"{self.where}: schema {str(schema)[:20]}, this program reads schema {SCHEMA}; "
                "index the shards again with `alignsae index` of this version"
            )
        width = self.integer(data, "width", 1, MAX_WIDTH)
        dtype = self.get(data, "dtype", str)
        if dtype not in STORED_DTYPES:
            raise self.fail(f"dtype {dtype!r:.40} is unknown (known: {', '.join(STORED_DTYPES)})")
        mean = [self.number(v, "mean") for v in self.get(data, "mean", list)]
        if len(mean) != width:
            raise self.fail(f"mean has {len(mean)} entries but width is {width}")
        scale = self.number(data.get("scale"), "scale")
        if scale <= 0:
            raise self.fail("scale must be positive")
        shards = tuple(self.shard(s) for s in self.get(data, "shards", list))
        if len({s.name for s in shards}) != len(shards):
            raise self.fail("two shards have the same name")
        rows = sum(b.rows for s in shards for b in s.blocks)
        if rows < 1:
            raise self.fail("no shard holds any row")
        if self.integer(data, "rows", 1, MAX_BYTES) != rows:
            raise self.fail(f"rows is {data['rows']} but the blocks hold {rows}")
        extra = data.get("extra", {})
        if not isinstance(extra, dict):
            raise self.fail("field 'extra' must be an object")
        return Manifest(
            width=width, dtype=dtype, model=self.get(data, "model", str), hook_point=self.get(data, "hook_point", str),
            mean=mean, scale=scale, concepts=self.names(data, "concepts"), answers=self.names(data, "answers"),
            rows=rows, shards=shards, extra=extra,
        )  # fmt: skip

    def shard(self, data: Any) -> Shard:
        name = self.get(data, "name", str)
        if not _SHARD_NAME.match(name) or ".." in name:
            raise self.fail(f"shard name {name!r:.80} is not a plain .tar file name")
        size = self.integer(data, "bytes", 512, MAX_BYTES)
        sha256 = self.get(data, "sha256", str)
        if not _HEX.match(sha256):
            raise self.fail(f"sha256 of {name} is not 64 hex digits")
        blocks = tuple(self.block(b, size) for b in self.get(data, "blocks", list))
        end = 0
        for block in blocks:
            if block.offset < end:
                raise self.fail(f"blocks of {name} overlap at {block.key}")
            end = block.offset + block.bytes
        return Shard(name, size, sha256, blocks)

    def block(self, data: Any, shard_bytes: int) -> Block:
        key = self.get(data, "key", str)
        if not valid_key(key):
            raise self.fail(f"key {key!r:.100} is not of letters, digits, _ and -")
        rows = self.integer(data, "rows", 1, MAX_BYTES)
        offset = self.integer(data, "offset", 0, shard_bytes)
        size = self.integer(data, "bytes", 1024, shard_bytes - offset)
        if offset % 512:
            raise self.fail(f"block {key} does not start on 512 bytes")
        spans = {n: self.span(data, n, offset, offset + size) for n in ("acts", "concept", "answer")}
        if spans["acts"] is None:
            raise self.fail(f"block {key} has no activations")
        crc32 = self.integer(data, "crc32", 0, 0xFFFFFFFF)
        return Block(key, rows, offset, size, spans["acts"], spans["concept"], spans["answer"], crc32)

    def span(self, data: Any, name: str, low: int, high: int) -> tuple[int, int] | None:
        if isinstance(data, dict) and name in data and data[name] is None:
            return None
        span = self.get(data, name, list)
        if len(span) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in span):
            raise self.fail(f"field {name!r} must be [offset, bytes]")
        start, size = span
        if start % 512 or size < 64 or not low + 512 <= start <= start + size <= high:
            raise self.fail(f"field {name!r} lies outside its block")
        return start, size


def valid_key(key: str) -> bool:
    """Whether a sample key is safe to show, to store and to hand to webdataset (no dots, no separators)."""
    return bool(_KEY.match(key))
