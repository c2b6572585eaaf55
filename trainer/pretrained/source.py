"""A dictionary of another program, as weights that act on raw activations, handed out a few slots at a time.

Shapes: D model width, n slots asked for, S slots in all.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.errors import DataError
from trainer.pretrained.tensors import TensorStore, check_sizes


@dataclass
class Facts:
    """Where a dictionary comes from.

    format: saelens, sparsify, gemma-scope or alignsae. architecture: as the source names it. location: without
    credentials. model, hook_point: "" where the source does not say. concepts: names of its first slots. files: name
    -> sha256. training: what the source says about how it was trained. gains: concept -> mean activation of its slot on
    the concept's rows, as far as they are known.
    """

    format: str
    architecture: str
    location: str
    model: str = ""
    hook_point: str = ""
    concepts: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)


class Source(ABC):
    """What every format is turned into.

    facts: see Facts. width: D. slots: S. top_k: k of a dictionary that keeps the k largest pre-activations of a row
    and has no threshold; None: what is active is decided slot by slot. k: mean active slots of a row as the source
    states it, None where it does not. written: what an activation of 1 of the first m slots writes where they are
    steered, [m, D] raw, None: their decoder rows.
    """

    facts: Facts
    width: int
    slots: int
    top_k: int | None = None
    k: float | None = None
    written: Tensor | None = None

    @abstractmethod
    def bank(self, begin: int, end: int) -> BankWeights:
        """The slots [begin, end): h [B, D] raw -> code -> share of the raw reconstruction. threshold None: 0."""

    @abstractmethod
    def output_bias(self) -> Tensor:
        """b_dec [D] of the raw reconstruction, fp32."""


@dataclass
class Layout:
    """How a file spells a dictionary.

    Names of tensors; threshold "" and b_enc "": there is none. encoder_columns: W_enc is [D, S]. subtracts_b_dec: the
    encoder is given the activation minus b_dec. factor: what activations are multiplied with beforehand. by_norm:
    codes are pre-activations times the norm of the decoder row, which is used at norm 1. log_threshold: thresholds are
    stored as logarithms.
    """

    W_enc: str = "W_enc"
    b_enc: str = "b_enc"
    W_dec: str = "W_dec"
    b_dec: str = "b_dec"
    threshold: str = ""
    encoder_columns: bool = False
    subtracts_b_dec: bool = False
    factor: float = 1.0
    by_norm: bool = False
    log_threshold: bool = False


class StoredSource(Source):
    """A dictionary whose tensors lie whole in one file.

    Raises DataError when they do not fit together.
    """

    def __init__(self, facts: Facts, store: TensorStore, layout: Layout):
        self.facts, self._store, self._layout = facts, store, layout
        shape = store.shape(layout.W_dec)
        if len(shape) != 2:
            raise DataError(f"{store.path}: {layout.W_dec} has shape {shape}, not [slots, width]")
        self.slots, self.width = shape
        check_sizes(store, self.width, self.slots)
        encoder = (self.width, self.slots) if layout.encoder_columns else shape
        wanted: dict[str, list[tuple[int, ...]]] = {
            layout.W_enc: [encoder],
            layout.b_dec: [(self.width,)],
            layout.b_enc: [(self.slots,)],
            layout.threshold: [(self.slots,), (), (1,)],
        }
        for name, shapes in wanted.items():
            if name and store.shape(name) not in shapes:
                raise DataError(f"{store.path}: {name} has shape {store.shape(name)}, not {shapes[0]}")
        self._b_dec = finite(store.whole(layout.b_dec), store, layout.b_dec)

    def bank(self, begin: int, end: int) -> BankWeights:
        store, layout = self._store, self._layout
        W_enc = store.columns(layout.W_enc, begin, end).T if layout.encoder_columns else None
        W_enc = finite(store.rows(layout.W_enc, begin, end) if W_enc is None else W_enc, store, layout.W_enc)
        W_dec = finite(store.rows(layout.W_dec, begin, end), store, layout.W_dec)
        b_enc = torch.zeros(end - begin)
        if layout.b_enc:
            b_enc = finite(store.rows(layout.b_enc, begin, end), store, layout.b_enc)
        threshold = self._threshold(begin, end)
        if layout.subtracts_b_dec:
            b_enc = (b_enc.double() - W_enc.double() @ self._b_dec.double()).float()
        weights = BankWeights(W_enc, b_enc, W_dec, threshold)
        if layout.by_norm:
            norm = W_dec.norm(dim=1).clamp_min(1e-8)
            # The threshold is one of codes already.
            weights = BankWeights(W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None], threshold)
        if layout.factor != 1.0:
            weights = weights._replace(W_enc=weights.W_enc * layout.factor, W_dec=weights.W_dec / layout.factor)
        return weights._replace(W_enc=weights.W_enc.contiguous())

    def _threshold(self, begin: int, end: int) -> Tensor | None:
        store, name = self._store, self._layout.threshold
        if not name:
            return None
        one = store.shape(name) != (self.slots,)
        found = store.whole(name).reshape(-1).expand(end - begin) if one else store.rows(name, begin, end)
        found = finite(found.exp() if self._layout.log_threshold else found, store, name)
        # z = relu(pre) where pre > threshold: one below 0 says nothing.
        return found.clamp_min(0.0).contiguous()

    def output_bias(self) -> Tensor:
        return self._b_dec / self._layout.factor


def finite(tensor: Tensor, store: TensorStore, name: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"{store.path}: {name} holds NaN or infinity; fetch it again, or ask who trained it")
    return tensor


def rescale(weights: BankWeights, gain: float | Tensor) -> BankWeights:
    """The same slots with codes `gain` times as large (one number, or one per slot [n]); reconstructions stay."""
    rows = gain[:, None] if isinstance(gain, Tensor) else gain
    threshold = None if weights.threshold is None else weights.threshold * gain
    return BankWeights(weights.W_enc * rows, weights.b_enc * gain, weights.W_dec / rows, threshold)


def sha256_of(folder: Path, *names: str) -> dict[str, str]:
    """name -> sha256 (hex) of files in a folder."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
