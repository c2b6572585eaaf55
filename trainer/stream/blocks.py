"""From the bytes of a block to arrays: shapes, dtypes, label ranges and finiteness are checked, nothing is copied."""

import mmap
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.errors import DataError
from trainer.labels import MOST_PER_ROW, UNKNOWN, BadLabel, canonical
from trainer.stream import npy, tar
from trainer.stream.manifest import STORED_DTYPES, Block

# Smallest bit patterns of infinity and NaN, read as a signed integer and, for negative values, as an unsigned one.
_NONFINITE = {
    "float16": (np.int16, 0x7C00, np.uint16, 0xFC00),
    "bfloat16": (np.int16, 0x7F80, np.uint16, 0xFF80),
    "float32": (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}
TOKEN = "token.npy"  # member of a block: where its rows come from
_CHUNK = 1 << 18  # bytes, so that both passes read cache


# Device, inode, bytes and time of the last change: two opened files that agree in all of them have the same content.
FileIdentity = tuple[int, int, int, int]


class BlockRows(NamedTuple):
    """One block: acts [n, D] as stored, concept int32 [n, M] (trainer.labels), answer int32 [n], valid bool [n], and
    outlier bool [n], rows that are not valid for their norm alone.

    M is what the block needs; other blocks of the data set may be wider.
    """

    acts: np.ndarray
    concept: np.ndarray
    answer: np.ndarray
    valid: np.ndarray
    outlier: np.ndarray


def map_file(path: Path) -> np.ndarray:
    """The file as a read-only memory map, uint8 [bytes]; raises DataError when it cannot be read or is empty."""
    return map_identified(path)[0]


def map_identified(path: Path) -> tuple[np.ndarray, FileIdentity]:
    """The map of `map_file`, and which file it shows: another one may have taken the name since the last time."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return data, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:  # an empty file cannot be mapped
        raise DataError(f"{path}: is empty") from None


def open_block(
    data: np.ndarray, block: Block, width: int, dtype: str, concepts: int, answers: int, per_row: int = MOST_PER_ROW
) -> BlockRows:
    """Views of a block. data: uint8 [block.bytes], the block's extent; width D; concepts R and answers A bound the
    labels, per_row how many concepts a row lists.

    Raises DataError (without a location) when a payload is not what the manifest says.
    """
    acts = _payload(data, block, block.acts, "activations")
    if acts.shape != (block.rows, width) or acts.dtype != STORED_DTYPES[dtype]:
        raise DataError(
            f"activations are {acts.dtype} {acts.shape}, the manifest says {STORED_DTYPES[dtype]} "
            f"({block.rows}, {width})"
        )
    concept = _concepts(data, block, concepts, per_row)
    answer = _answers(data, block, answers)
    return BlockRows(acts, concept, answer, np.ones(block.rows, dtype=bool), np.zeros(block.rows, dtype=bool))


def origin_of(data: np.ndarray, block: Block, where: str) -> np.ndarray | None:
    """The member `token.npy` of a block, int32 [n, 3]; None where there is none. data: uint8 [block.bytes]. Raises
    DataError, with `where`, when it is damaged."""
    for member in tar.members(np.concatenate([data, np.zeros(2 * tar.BLOCK, np.uint8)]), where):
        if member.name.partition(".")[2] == TOKEN:
            token = npy.view(data[member.offset : member.offset + member.size], where)
            if token.shape != (block.rows, 3) or token.dtype.kind != "i":
                raise DataError(f"{where}: token is {token.dtype} {token.shape}, not integers ({block.rows}, 3)")
            return token.astype(np.int32, copy=False)
    return None


def check_extent(block: Block, width: int, dtype: str) -> None:
    """Raise DataError (without a location) when a block claims more rows than its bytes hold; nothing is allocated."""
    sizes = [(block.acts, width * STORED_DTYPES[dtype].itemsize), (block.concept, 1), (block.answer, 1)]
    most = min((span[1] - npy.SHORTEST_HEADER) // row_bytes for span, row_bytes in sizes if span is not None)
    if block.rows > most:
        raise DataError(f"claims {block.rows} rows, its payloads hold {most} at most")


def _payload(data: np.ndarray, block: Block, span: tuple[int, int], name: str) -> np.ndarray:
    start = span[0] - block.offset
    return npy.view(data[start : start + span[1]], name)


def _concepts(data: np.ndarray, block: Block, concepts: int, per_row: int) -> np.ndarray:
    if block.concept is None:
        return np.full((block.rows, 1), UNKNOWN, dtype=np.int32)
    labels = _payload(data, block, block.concept, "concept")
    wide = labels.shape[1] if labels.ndim == 2 else 1
    if labels.dtype.kind != "i" or labels.shape not in ((block.rows,), (block.rows, wide)) or not 1 <= wide <= per_row:
        raise DataError(
            f"concept is {labels.dtype} {labels.shape}, not integers [{block.rows}] or [{block.rows}, 1 to {per_row}]"
        )
    try:
        return canonical(labels, concepts)
    except BadLabel as error:
        raise DataError(f"row {error.row}: {error}") from None


def _answers(data: np.ndarray, block: Block, answers: int) -> np.ndarray:
    if block.answer is None:
        return np.full(block.rows, -1, dtype=np.int32)
    labels = _payload(data, block, block.answer, "answer")
    if labels.shape != (block.rows,) or labels.dtype.kind != "i":
        raise DataError(f"answer is {labels.dtype} {labels.shape}, not one integer per row")
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= answers:
        raise DataError(f"answer label {low if low < -1 else high} is outside -1..{answers - 1}")
    return labels.astype(np.int32, copy=False)


def nonfinite_rows(acts: np.ndarray, dtype: str) -> np.ndarray | None:
    """Indices of rows of acts [n, D] (as stored) with NaN or infinity; None when there are none."""
    signed, high, unsigned, low = _NONFINITE[dtype]
    flat = acts.reshape(-1)
    stride = _CHUNK // acts.itemsize
    for start in range(0, len(flat), stride):
        part = flat[start : start + stride]
        if part.view(signed).max() >= high or part.view(unsigned).max() >= low:
            bits = acts.view(unsigned)
            return np.flatnonzero(((bits & high) == high).any(axis=1))
    return None
