"""Small data sets for the stream tests: what is in them, how they are written, and rows that no writer lets through."""

import dataclasses
import zlib
from pathlib import Path

import numpy as np
import torch

from trainer.stream import DataConfig, Manifest, Plan, ShardSpec, ShardWriter, Stream

CONCEPTS = ["born", "studied", "works"]
ANSWERS = ["a", "b", "c", "d", "e"]


def rows(count: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """acts [n, D] whose first entry is the row number, which tells a row from its content; labels -1 included."""
    generator = np.random.default_rng(seed)
    acts = generator.standard_normal((count, width)).astype(np.float32)
    acts[:, 0] = np.arange(count)
    return acts, np.arange(count) % 4 - 1, np.arange(count) % 6 - 1


def spec(width: int = 4, dtype: str = "float32", **options) -> ShardSpec:
    return ShardSpec(width=width, dtype=dtype, concepts=CONCEPTS, answers=ANSWERS, **options)


def write(
    folder: Path, count: int = 300, width: int = 4, dtype: str = "float32", extra: dict | None = None, **options
) -> Manifest:
    settings = {"rows_per_block": 32, "shard_bytes": 4096, **options}
    with ShardWriter(folder, "train", spec(width, dtype, extra=extra or {}), **settings) as writer:
        writer.write(*rows(count, width))
    return Manifest.load(folder)


def read(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(acts, concept, answer) of a data set in row order, as the stream delivers them; concept [n] where M is 1."""
    manifest = Manifest.load(folder)
    plan = Plan(manifest, 0, manifest.rows, 1, 4)
    with Stream(DataConfig(shards=str(folder), threads=0), manifest, plan, range(1)) as stream:
        batch = next(stream)
    order = batch.row_ids.argsort()
    concept = batch.concept[order]
    return batch.acts[order], concept[:, 0] if manifest.concepts_per_row == 1 else concept, batch.answer[order]


def poison(folder: Path, manifest: Manifest, values: dict[int, float], dtype: str) -> None:
    """Overwrite the second number of rows of the first shard, which has blocks of 16."""
    path = folder / manifest.shards[0].name
    data = bytearray(path.read_bytes())
    for row, value in values.items():
        block = manifest.shards[0].blocks[row // 16]
        bits = torch.tensor([value], dtype=getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()
        start = block.acts[0] + 128 + (row % 16) * 4 * len(bits) + len(bits)
        data[start : start + len(bits)] = bits
    path.write_bytes(data)


def recount(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the checksums of the files as they are now."""
    shards = []
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        blocks = tuple(
            dataclasses.replace(b, crc32=zlib.crc32(data[b.offset : b.offset + b.bytes])) for b in shard.blocks
        )
        shards.append(dataclasses.replace(shard, blocks=blocks))
    changed = dataclasses.replace(manifest, shards=tuple(shards))
    changed.save(folder)
    return changed
