"""manifest.json: what a folder of shards holds, so that no tar is scanned and every byte can be checked.

The digest of the manifest identifies the data set: the epoch order is derived from it and a checkpoint records it.
"""

import hashlib
import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from trainer.errors import DataError, UserError
from trainer.files import checked, parse_json, whole, write_atomically, wrong
from trainer.labels import MOST_PER_ROW
from trainer.redact import redact
from trainer.stream.location import is_remote, local_path
from trainer.stream.names import KEY
from trainer.stream.remote import read_file

SCHEMA = 1
FILE_NAME = "manifest.json"
# bfloat16 has no npy type; its bits are stored as unsigned 16-bit integers.
STORED_DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
}
MAX_WIDTH = 1 << 20
MAX_BYTES = 1 << 48
MAX_NAME = 1000  # characters of a concept's or answer's name: tables and pages show them
MAX_PAYLOAD = (1 << 33) - 1  # bytes of a tar member: eleven octal digits
_LEAST_HEADER = 64  # bytes of an npy file that are no numbers, at least
_FP32 = np.finfo(np.float32)

# Keys are webdataset sample keys, which end at the first dot; names are files of the shard folder itself.
Key = Annotated[
    str, Meta(pattern=rf"\A{KEY}\Z", extra=wrong("key {value} of {field} is not of letters, digits, _ and -"))
]
ShardName = Annotated[
    str,
    Meta(
        pattern=r"\A(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}\.tar\Z",
        extra=wrong("shard name {value} in {field} is not a plain .tar file name"),
    ),
]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z", extra=wrong("{field}={value} is not 64 hex digits"))]
# Activations are normalised in fp32.
Mean = Annotated[
    float, Meta(ge=-float(_FP32.max), le=float(_FP32.max), extra=wrong("{field} must hold finite numbers"))
]


def _positive(name: str) -> Meta:
    """Bounds of a number that is positive in fp32."""
    text = f"{name} must be positive and of the finite numbers of fp32, not {{value}}"
    return Meta(ge=float(_FP32.tiny), le=float(_FP32.max), extra=wrong(text))


Scale = Annotated[float, _positive("scale")]
MedianNorm = Annotated[float, _positive("median_norm")]
Rows = Annotated[int, whole(1, MAX_BYTES)]
# (offset in the shard, bytes) of an npy payload.
Span = tuple[Annotated[int, whole(0, MAX_BYTES)], Annotated[int, whole(_LEAST_HEADER, MAX_PAYLOAD)]]
ActsSpan = Annotated[Span, Meta(extra=wrong("{field}={value} is not [offset, bytes]: the block has no activations"))]


@dataclass(frozen=True)
class Block:
    """One sample of a shard: `rows` consecutive rows.

    offset, bytes: the sample's extent in the shard, tar headers and padding included; `crc32` covers all of it.
    acts, concept, answer: (offset in the shard, bytes) of the npy payloads; None where a foreign shard has no labels.
    """

    key: Key
    rows: Rows
    offset: Annotated[int, whole(0, MAX_BYTES)]
    bytes: Annotated[int, whole(1024, MAX_BYTES)]
    acts: ActsSpan
    concept: Span | None
    answer: Span | None
    crc32: Annotated[int, whole(0, 0xFFFFFFFF)]

    def check(self, shard_bytes: int, row_bytes: int) -> None:
        """Raise ValueError unless the block lies in its shard, its payloads in the block, and its rows in its payloads.

        row_bytes: of the activations of one row.
        """
        if self.offset % 512:
            raise ValueError(f"block {self.key} does not start on 512 bytes")
        end = self.offset + self.bytes
        if end > shard_bytes:
            raise ValueError(
                f"field 'bytes' is outside 1024..{shard_bytes - self.offset} in block {self.key}: the shard ends there"
            )
        for name, least in (("acts", row_bytes), ("concept", 1), ("answer", 1)):
            span = getattr(self, name)
            if span is None:
                continue
            start, size = span
            if start % 512 or not self.offset + 512 <= start <= start + size <= end:
                raise ValueError(f"field {name!r} of block {self.key} lies outside its block")
            if self.rows * least > size - _LEAST_HEADER:
                most = (size - _LEAST_HEADER) // least
                raise ValueError(f"block {self.key} has rows={self.rows}, but the bytes of {name} hold at most {most}")


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, size, sha256 and blocks in file order."""

    name: ShardName
    bytes: Annotated[int, whole(512, MAX_BYTES)]
    sha256: Sha256
    blocks: tuple[Block, ...]

    def check(self, row_bytes: int) -> None:
        """Raise ValueError unless the blocks are sound and follow each other."""
        end = 0
        for block in self.blocks:
            if block.offset < end:
                raise ValueError(f"blocks of {self.name} overlap at {block.key}")
            block.check(self.bytes, row_bytes)
            end = block.offset + block.bytes


@dataclass(frozen=True)
class ComputedBlock:
    """`rows` consecutive rows that no shard holds: they are computed when they are asked for (stream/live.py)."""

    key: Key
    rows: Rows


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """What is known of a split before its rows are.

    width: D. dtype: float16, float32 or bfloat16. concepts [R] and answers [A] name the label values. model,
    hook_point: where the activations come from. extra: free metadata, part of the digest.
    """

    width: Annotated[int, whole(1, MAX_WIDTH)]
    dtype: str
    concepts: list[str]
    answers: list[str]
    model: str = ""
    hook_point: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        """Bytes of the activations of one row."""
        return self.width * STORED_DTYPES[self.dtype].itemsize

    def check(self) -> None:
        """Raise ValueError, one line, for what cannot be stored."""
        if not 1 <= self.width <= MAX_WIDTH:
            raise ValueError(f"width {self.width} is outside 1..{MAX_WIDTH}")
        if self.dtype not in STORED_DTYPES:
            raise ValueError(f"dtype {self.dtype!r:.40} is unknown (known: {', '.join(STORED_DTYPES)})")
        for name in ("concepts", "answers"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"field {name!r} repeats a name")
            if max(map(len, values), default=0) > MAX_NAME:
                raise ValueError(f"field {name!r} has a name longer than {MAX_NAME} characters")


@dataclass(frozen=True, kw_only=True)
class Manifest(ShardSpec):
    """Everything about one split that a reader must know.

    mean [D] and scale: x = (h - mean) / scale has mean squared norm 1. rows: of all blocks of all shards, or of
    `computed`, the blocks of a data set without shards.
    concepts_per_row: M, the most concepts that a row can list. median_norm: of raw rows, to some percent, if measured.
    """

    mean: list[Mean]
    scale: Scale
    rows: Rows
    shards: tuple[Shard, ...]
    concepts_per_row: Annotated[int, whole(1, MOST_PER_ROW)] = 1
    median_norm: MedianNorm | None = None
    computed: tuple[ComputedBlock, ...] = ()
    schema: int = SCHEMA

    def check(self) -> None:
        """Raise ValueError, one line, unless the parts agree with each other."""
        super().check()
        if len(self.mean) != self.width:
            raise ValueError(f"mean has {len(self.mean)} entries but width is {self.width}")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("two shards have the same name")
        for shard in self.shards:
            shard.check(self.row_bytes)
        if self.shards and self.computed:
            raise ValueError("blocks are in shards or are computed, not both")
        rows = int(self.block_rows.sum())
        if rows < 1:
            raise ValueError("no shard holds any row")
        if self.rows != rows:
            raise ValueError(f"rows is {self.rows} but the blocks hold {rows}")

    def most_norm(self, multiple: float) -> float | None:
        """The norm that is `multiple` times the median (data.max_norm); None where that bounds nothing."""
        return multiple * self.median_norm if multiple and self.median_norm is not None else None

    def require_shards(self, where: str) -> None:
        """Raise UserError for a manifest of rows that are computed."""
        if self.computed:
            raise UserError(
                f"{where} is the manifest of rows that are computed, not of shards; name it in data.live.manifest, or "
                "`alignsae extract` them"
            )

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return self._canonical(set() if self.median_norm is not None else {"median_norm"})

    def _canonical(self, left_out: set[str]) -> str:
        # The digest of a data set must not depend on who knows these fields.
        if self.concepts_per_row == 1:
            left_out = {*left_out, "concepts_per_row"}
        if not self.computed:
            left_out = {*left_out, "computed"}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return json.dumps(own, default=vars, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON without median_norm: the rows fix that, and older manifests lack it."""
        return hashlib.sha256(self._canonical({"median_norm"}).encode()).hexdigest()

    @cached_property
    def blocks(self) -> list[tuple[int, Block]]:
        """(shard index, block) of every block of shards in row order."""
        return [(s, block) for s, shard in enumerate(self.shards) for block in shard.blocks]

    @cached_property
    def block_rows(self) -> np.ndarray:
        """Rows per block, int64 [blocks]."""
        return np.array([block.rows for block in self.computed or [block for _, block in self.blocks]], dtype=np.int64)

    @cached_property
    def keys(self) -> list[str]:
        """Key of every block in row order."""
        return [block.key for block in self.computed or [block for _, block in self.blocks]]

    def save(self, folder: str | Path) -> Path:
        """Write manifest.json into `folder` atomically and return its path."""
        return write_atomically(Path(folder) / FILE_NAME, self.to_json().encode() + b"\n")

    @classmethod
    def load(
        cls, location: str | Path, *, allow_pipe: bool = False, retries: int = 4, timeout: float = 60.0
    ) -> "Manifest":
        """The checked manifest of a folder or URL; raises DataError when it is missing, foreign or inconsistent."""
        path = None if is_remote(str(location)) else local_path(str(location)) / FILE_NAME
        if path is not None and path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError(f"{path}: is not a regular file; fetch a fresh copy of the data set")
        payload = read_file(str(location), FILE_NAME, allow_pipe=allow_pipe, retries=retries, timeout=timeout)
        return cls.parse(payload, f"{redact(str(location)).rstrip('/')}/{FILE_NAME}")

    @classmethod
    def parse(cls, payload: bytes, where: str) -> "Manifest":
        """Manifest from the bytes of manifest.json; `where` names it in errors."""
        try:
            return _read(payload, where)
        except ValueError as error:
            raise DataError(f"{where}: {error}; write it again with `alignsae index` or fetch a fresh copy") from None


def _read(payload: bytes, where: str) -> Manifest:
    """Raises ValueError for what is no manifest, DataError for one of another schema."""
    try:
        data = parse_json(payload)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int:
        raise ValueError("field 'schema' is missing")
    if schema != SCHEMA:
        raise DataError(
            f"{where}: schema {str(schema)[:20]}, this program reads schema {SCHEMA}; "
            "index the shards again with `alignsae index` of this version"
        )
    # A specification may leave out what a manifest says.
    for name in ("model", "hook_point"):
        if name not in data:
            raise ValueError(f"field {name!r} is missing")
    manifest = checked(data, Manifest)
    manifest.check()
    try:
        manifest.digest  # noqa: B018  # metadata that canonical JSON cannot hold (too deep) fails here
    except RecursionError:
        raise ValueError("not valid JSON (field 'extra' is nested too deep)") from None
    return manifest
