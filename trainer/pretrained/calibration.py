"""What a dictionary does on given rows, and the one threshold that stands for "the k largest of a row".

Shapes: N rows, D model width, n slots of a bank, S slots. Banks are visited one by one; no code [N, S] exists.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.dictionary import BankWeights, normalisation
from trainer.dictionary.gate import apply_gate
from trainer.errors import DataError
from trainer.pretrained.source import Source
from trainer.stream import DataConfig, Manifest
from trainer.stream.shards import from_stored
from trainer.stream.source import BlockSource

BANK = 8192  # slots visited at a time
# Values of a row that are looked at, in multiples of k: the threshold is exact unless a row has more above it.
_KEPT = 4
ROWS = 8192  # that thresholds and figures are taken from, spread over the shards

Gated = Callable[[Tensor, BankWeights], Tensor]  # pre-activations [N, n] and their bank -> code [N, n]


@dataclass(frozen=True)
class Measured:
    """L0: mean active slots of a row. FVU: about the mean of these rows; None when they do not vary. rows: N."""

    rows: int
    l0: float
    fvu: float | None


def sample(folder: str) -> Tensor:
    """Up to ROWS raw rows [N, D] fp32 of a shard folder, from blocks spread evenly over it."""
    manifest = Manifest.load(folder)
    blocks = len(manifest.blocks)
    wanted = min(blocks, -(-ROWS * blocks // manifest.rows) + 1)
    each = -(-ROWS // wanted)
    with closing(BlockSource(DataConfig(shards=folder), manifest)) as source:
        parts = []
        for number in range(wanted):
            block = source.rows(number * blocks // wanted)
            acts = from_stored(block.acts[block.valid], manifest.dtype).float()
            parts.append(acts[torch.linspace(0, len(acts) - 1, min(each, len(acts))).long()])
    rows = torch.cat(parts)
    if not bool(torch.isfinite(rows).all()):
        raise DataError(f"{folder}: holds NaN or infinite values; run `alignsae verify` on it")
    return rows


@torch.no_grad()
def measure(source: Source, h: Tensor, theta: float | None = None) -> Measured:
    """Of raw rows h [N, D], with the source's own thresholds, or with `theta` for every slot."""

    def gated(pre: Tensor, weights: BankWeights) -> Tensor:
        return apply_gate(pre, weights.threshold if theta is None else torch.full_like(weights.b_enc, theta))

    return _reconstruct(source, h, gated)


@torch.no_grad()
def threshold(source: Source, h: Tensor, k: int) -> tuple[float, Tensor]:
    """The threshold above which k entries a row lie on average over the rows h [N, D], and the k-th largest value of
    each row [N, 1]. Raises DataError when the rows leave nothing to choose."""
    kept = min(source.slots, _KEPT * k)
    while True:
        top = h.new_zeros(len(h), 0)
        for pre, _ in _visit(source, h):
            both = torch.cat([top, pre.clamp_min(0.0)], dim=1)
            top = both.topk(min(kept, both.shape[1]), dim=1).values
        theta = _between(top.flatten(), k * len(h))
        # A row whose smallest kept value is above it may have more entries above it than were looked at.
        if kept == source.slots or not bool((top[:, -1] > theta).any()):
            break
        kept = min(source.slots, 2 * kept)
    if not bool((top[:, 0] > 0).any()):
        raise DataError(
            "no slot is active on any of the rows; are they of the model and hook point of this dictionary?"
        )
    return theta, top[:, k - 1 : k]


@torch.no_grad()
def calibrate(source: Source, h: Tensor) -> tuple[float, Measured]:
    """For a source that keeps the top_k largest of a row: `threshold` of the rows h [N, D], and what the true top k
    does on them."""
    assert source.top_k is not None
    theta, least = threshold(source, h, source.top_k)

    def largest(pre: Tensor, _: BankWeights) -> Tensor:
        return torch.relu(pre).masked_fill(pre < least, 0.0)

    return theta, _reconstruct(source, h, largest)


@torch.no_grad()
def gain(source: Source, h: Tensor, theta: float) -> float:
    """The factor of all codes with the least squared error on the rows h [N, D], with `theta` for every slot."""
    left, given = _centred(source, h), torch.zeros_like(h)
    for pre, weights in _visit(source, h):
        given += weights.decode(apply_gate(pre, torch.full_like(weights.b_enc, theta)))
    return float((left * given).double().sum() / given.double().square().sum())


def _between(values: Tensor, count: int) -> float:
    """Halfway between the smallest of the `count` largest values and the next one, so that rounding moves none
    across; 0 without a next."""
    if values.numel() <= count:
        return 0.0
    below, above = (values.kthvalue(values.numel() - rank).values.double() for rank in (count, count - 1))
    return float((below + above) / 2)


def _visit(source: Source, h: Tensor) -> Iterator[tuple[Tensor, BankWeights]]:
    """Pre-activations [N, n] of each bank, with its weights for centred rows."""
    mean, one = h.double().mean(dim=0).float(), torch.ones(())
    for begin in range(0, source.slots, BANK):
        # Rows minus their mean: the mean of a residual stream can be far larger than what is left, and fp32 would lose
        # that.
        weights = normalisation.unfold(source.bank(begin, min(begin + BANK, source.slots)), mean, one)
        yield weights.pre_activations(h - mean), weights


def _centred(source: Source, h: Tensor) -> Tensor:
    """What slots are to reconstruct of the rows: [N, D]."""
    mean = h.double().mean(dim=0).float()
    return h - mean - normalisation.unfold_output(source.output_bias(), mean, torch.ones(()))


def _reconstruct(source: Source, h: Tensor, gated: Gated) -> Measured:
    mean, left = h.double().mean(dim=0).float(), _centred(source, h)
    active = 0.0
    for pre, weights in _visit(source, h):
        z = gated(pre, weights)
        active += float((z > 0).sum())
        left -= weights.decode(z)
    variance = float((h - mean).double().square().sum())
    fvu = float(left.double().square().sum()) / variance if variance > 0 else None
    return Measured(len(h), active / len(h), fvu)
