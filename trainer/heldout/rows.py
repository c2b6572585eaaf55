"""Which held-out rows are evaluated during training, read once and kept.

Shapes: N held-out rows of a source, n of them on this rank, D width, M labels of a row at most.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.errors import DataError, UserError
from trainer.labels import widened
from trainer.stream import SINGLE, DataConfig, Manifest, Sources
from trainer.stream.shards import from_stored, row_norms
from trainer.stream.source import BlockSource
from trainer.stream.sources import relabelled
from trainer.topology import Topology

log = logging.getLogger(__name__)

MOST_BLOCKS = 32  # that rows are taken from, where not all rows are: each is read and checked whole


def load_heldout(data: DataConfig, sources: Sources) -> dict[str, Manifest]:
    """Manifests of the held-out folders by source, without sources that have none.

    Raises UserError for rows that are not those of the training data's place, name other concepts, or are trained on.
    """
    found = {}
    for name, manifest in sources.manifests.items():
        chosen = data.of(name)
        if not chosen.heldout:
            continue
        key = _key(name)
        try:
            held = Manifest.load(
                chosen.heldout, allow_pipe=chosen.allow_pipe, retries=chosen.retries, timeout=chosen.timeout
            )
        except DataError as error:  # whose remedy names the usual place
            raise DataError(str(error).replace("data.shards", key)) from None
        for field in ("width", "model", "hook_point"):
            ours, theirs = getattr(manifest, field), getattr(held, field)
            if ours != theirs and ours and theirs:
                raise UserError(
                    f"{key} has {field} {theirs}, the training data has {ours}; extract both from one place"
                )
        if foreign := [concept for concept in held.concepts if concept not in sources.manifest.concepts]:
            raise UserError(
                f"{key} names the concept {foreign[0]!r:.80}, which no training row names; extract both in one go"
            )
        if held.digest in [one.digest for one in sources.manifests.values()]:
            raise UserError(f"{key} holds rows that are trained on; name those of another split")
        found[name] = held
    return found


@dataclass
class Part:
    """Held-out rows of one source: acts [n, D], this rank's as they are stored; own, which of the N rows these are;
    concept int64 [N, M] of all of them."""

    name: str
    acts: Tensor
    own: slice
    concept: Tensor


def read_parts(data: DataConfig, manifests: Mapping[str, Manifest], sources: Sources, topology: Topology) -> list[Part]:
    """The held-out rows of each source that has any. Raises DataError for damaged rows, on all ranks alike."""
    per_row = max(manifest.concepts_per_row for manifest in manifests.values())
    parts = []
    for name, manifest in manifests.items():
        limit = sources.manifests[name].most_norm(data.max_norm)
        acts, concept = _read(data.of(name), manifest, data.heldout_rows, limit)
        if not len(acts):
            raise DataError(f"{_key(name)}: the rows that are taken all have giant norms (data.max_norm)")
        labels = relabelled(concept, manifest.concepts, sources.manifest.concepts)
        begin, end = (len(acts) * rank // topology.data_world for rank in (topology.data_rank, topology.data_rank + 1))
        mine = from_stored(np.ascontiguousarray(acts[begin:end]), manifest.dtype)
        parts.append(Part(name, mine, slice(begin, end), torch.from_numpy(widened(labels, per_row)).long()))
        if topology.is_main:
            log.info("%d of the %d rows of %s are evaluated", len(acts), manifest.rows, _key(name))
    return parts


def _key(source: str) -> str:
    """What says where the held-out rows of a source are."""
    return "data.heldout" if source == SINGLE else f"data.sources.{source}.heldout"


def _read(data: DataConfig, manifest: Manifest, most: int, limit: float | None) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` rows (0: all) of the held-out folder of a source, spread over it: activations as stored, and
    labels [N, M] as the manifest numbers them; without rows of a norm above `limit`."""
    # What all ranks look at has no damage that one of them may mask.
    config = replace(data, shards=data.heldout, heldout="", max_norm=0.0, quarantine_budget=0, nonfinite_budget=0)
    acts, concept = [], []
    with closing(BlockSource(config, manifest)) as source:
        for index, rows in chosen_rows(manifest.block_rows, most):
            block = source.rows(index)
            stored = block.acts[rows]
            small = np.ones(len(rows), bool) if limit is None else row_norms(stored, manifest.dtype) <= limit
            acts.append(stored[small])
            concept.append(widened(block.concept[rows][small], manifest.concepts_per_row))
    return np.concatenate(acts), np.concatenate(concept)


def chosen_rows(sizes: np.ndarray, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """Numbers of blocks, and of the rows that are taken of each; sizes: rows of all blocks."""
    blocks = np.arange(len(sizes))
    if 0 < most < sizes.sum():
        blocks = np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), MOST_BLOCKS)).round().astype(np.int64))
    edges = np.concatenate([[0], np.cumsum(sizes[blocks])])
    taken = min(most, edges[-1]) if most else edges[-1]
    places = np.arange(taken) * edges[-1] // taken
    for block, begin, end in zip(blocks.tolist(), edges[:-1], edges[1:], strict=True):
        rows = places[(places >= begin) & (places < end)] - begin
        if len(rows):
            yield block, rows
