"""Reading whole shards front to back: building manifest entries for foreign shards, and checking a finished folder."""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from trainer.errors import DataError
from trainer.stream import npy
from trainer.stream.blocks import TOKEN, map_file, nonfinite_rows, open_block
from trainer.stream.manifest import FILE_NAME, STORED_DTYPES, Block, Manifest, Shard
from trainer.stream.names import valid_key
from trainer.stream.tar import Sample, samples

SUFFIXES = {"acts": "acts.npy", "concept": "concept.npy", "answer": "answer.npy"}
_CHUNK = 8 << 20


def sha256_of(data: np.ndarray, progress: Callable[[int], object]) -> str:
    """sha256 (hex) of uint8 [bytes]; `progress` hears the bytes of every chunk."""
    digest = hashlib.sha256()
    for start in range(0, len(data), _CHUNK):
        part = data[start : start + _CHUNK]
        digest.update(part.data)
        progress(len(part))
    return digest.hexdigest()


def scan_shard(path: Path, suffixes: dict[str, str], progress: Callable[[int], object]) -> tuple[Shard, np.ndarray]:
    """Manifest entry of a shard of blocks, and its map. suffixes: member suffix of acts, concept and answer.

    Raises DataError when the tar is damaged or a sample has no activations of two dimensions.
    """
    data = map_file(path)
    blocks = tuple(_block(data, sample, suffixes, str(path)) for sample in samples(data, str(path)))
    return Shard(path.name, len(data), sha256_of(data, progress), blocks), data


def _block(data: np.ndarray, sample: Sample, suffixes: dict[str, str], where: str) -> Block:
    spans = {}
    for name, suffix in suffixes.items():
        member = sample.members.get(suffix)
        spans[name] = (member.offset, member.size) if member else None
    place = f"{where}: sample {sample.key!r:.100} at byte {sample.start}"
    if spans["acts"] is None:
        raise DataError(
            f"{place} has no .{suffixes['acts']}; name its suffix with --acts, or turn one-vector samples into blocks "
            "with `alignsae repack`"
        )
    start, size = spans["acts"]
    acts = npy.view(data[start : start + size], place)
    if acts.ndim != 2 or not acts.size:
        raise DataError(f"{place} holds activations of shape {acts.shape}, not [rows, D]; use `alignsae repack`")
    key = sample.key if valid_key(sample.key) else re.sub(r"[^A-Za-z0-9_-]", "_", "s" + sample.key)[:80]
    crc32 = zlib.crc32(data[sample.start : sample.end].data)
    extent = sample.end - sample.start
    return Block(key, len(acts), sample.start, extent, spans["acts"], spans["concept"], spans["answer"], crc32)


def form_of(extent: np.ndarray, block: Block) -> tuple[int, str]:
    """(width, dtype name) of a block's activations. extent: uint8 [block.bytes]. Raises DataError for other dtypes."""
    start = block.acts[0] - block.offset
    acts = npy.view(extent[start : start + block.acts[1]], "activations")
    for name, stored in STORED_DTYPES.items():
        if acts.dtype == stored:
            return acts.shape[1], name
    raise DataError(
        f"activations are {acts.dtype}, not one of {', '.join(STORED_DTYPES)}; convert them with `alignsae repack`"
    )


def verify_shard(folder: Path, manifest: Manifest, shard: Shard, progress: Callable[[int], object]) -> Iterator[str]:
    """Every disagreement between a shard and its manifest entry, one line each."""
    path = folder / shard.name
    try:
        data = map_file(path)
    except DataError as error:
        yield str(error)
        return
    if len(data) != shard.bytes:
        yield f"{path}: has {len(data)} bytes, the manifest says {shard.bytes}"
    if sha256_of(data, progress) != shard.sha256:
        yield f"{path}: sha256 differs from the manifest"
    for block in shard.blocks:
        place = f"{path}: block {block.key} at byte {block.offset}"
        if block.offset + block.bytes > len(data):
            yield f"{place}: lies beyond the end of the file"
            continue
        extent = data[block.offset : block.offset + block.bytes]
        if zlib.crc32(extent.data) != block.crc32:
            yield f"{place}: bytes do not match crc32"
        try:
            sizes = (manifest.width, manifest.dtype, len(manifest.concepts), len(manifest.answers))
            rows = open_block(extent, block, *sizes, manifest.concepts_per_row)
            bad = nonfinite_rows(rows.acts, manifest.dtype)
        except DataError as error:
            yield f"{place}: {error}"
            continue
        if bad is not None:
            yield f"{place}: {len(bad)} rows hold NaN or infinity, first row {bad[0]} of the block"
    yield from _structure(path, data, shard)


def _structure(path: Path, data: np.ndarray, shard: Shard) -> Iterator[str]:
    """Damage of the tar itself, payloads that the manifest and the tar place differently, and origins of rows that are
    no integers [rows, 3]."""
    spans = {s for b in shard.blocks for s in (b.acts, b.concept, b.answer) if s is not None}
    rows = {block.offset: block.rows for block in shard.blocks}
    try:
        for sample in samples(data, str(path)):
            spans -= {(m.offset, m.size) for m in sample.members.values()}
            member = sample.members.get(TOKEN)
            if member is None or sample.start not in rows:
                continue
            place = f"{path}: block {sample.key} at byte {sample.start}: {TOKEN}"
            token = npy.view(data[member.offset : member.offset + member.size], place)
            if token.shape != (rows[sample.start], 3) or token.dtype.kind != "i":
                yield f"{place} is {token.dtype} {token.shape}, not integers ({rows[sample.start]}, 3)"
    except DataError as error:
        yield str(error)
        return
    for offset, size in sorted(spans):
        yield f"{path}: the manifest places {size} bytes at byte {offset} where the tar has no member"


def stray_shards(folder: Path, manifest: Manifest) -> list[str]:
    """Tars in the folder that the manifest does not know: their rows would silently be left out."""
    known = {shard.name for shard in manifest.shards}
    return [
        f"{path}: not in {FILE_NAME}; index the folder again"
        for path in sorted(folder.glob("*.tar"))
        if path.name not in known
    ]
