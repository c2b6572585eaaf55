"""This trainer's own runs and checkpoints as a Source: read unit by unit, normalisation folded in.

Concept slots that are awake come first; nothing of the dictionary is lost, but they are slots like others from then on.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.checkpoint.state import RunState
from trainer.dictionary import BankWeights, OutputBias, SlotBank, bank_unit, joined, normalisation
from trainer.dictionary.units import CONCEPTS, OUTPUT
from trainer.errors import DataError
from trainer.pretrained.source import Facts, Source, sha256_of
from trainer.stream import Manifest

_KEPT = 2  # units in memory


class CheckpointSource(Source):
    """The newest checkpoint of a run that verifies, or one checkpoint.

    Raises UserError when there is no usable one.
    """

    def __init__(self, path: Path, location: str):
        folder, _ = checkpoint.find(str(path), path)
        assert folder is not None  # a named path that has none raises
        self._folder, state = folder, checkpoint.read_state(folder)
        self._form, manifest = state.dictionary, Manifest.load(str(folder))
        self.width = self._form.width
        if manifest.width != self._form.width:
            raise DataError(f"manifest.json of {folder} has width {manifest.width}, state.json {self._form.width}")
        self._mean, self._scale = torch.tensor(manifest.mean), torch.tensor(manifest.scale)
        self._writes_apart = state.writes_apart
        self._units: OrderedDict[str, BankWeights] = OrderedDict()
        names = [bank_unit(number) for number in range(self._form.banks)]
        sizes = self._form.bank_sizes
        if self._form.concepts and bool(self._unit(CONCEPTS, len(self._form.concepts)).W_dec.any()):
            names, sizes = [CONCEPTS, *names], [len(self._form.concepts), *sizes]
        self._parts = list(zip(names, sizes, strict=True))
        self.slots = sum(sizes)
        self.k = float(self._form.k) if self._form.gate == "batch_topk" else None
        self.facts = facts_of(state, manifest, location)
        self.facts.concepts = self._form.concepts if names[0] == CONCEPTS else []
        # It lists the hashes of all others.
        self.facts.files = sha256_of(folder, "hashes.json")

    def bank(self, begin: int, end: int) -> BankWeights:
        parts, first = [], 0
        for name, size in self._parts:
            low, high = max(begin, first), min(end, first + size)
            if low < high:
                parts.append(_slice(self._unit(name, size), low - first, high - first))
            first += size
        return joined(parts)  # concept slots are relu whatever the free ones are

    def output_bias(self) -> Tensor:
        output = OutputBias(self.width)
        checkpoint.load_unit(self._folder, OUTPUT, output)
        return normalisation.fold_output(output.b_dec.detach(), self._mean, self._scale)

    @torch.no_grad()
    def _unit(self, name: str, slots: int) -> BankWeights:
        if name not in self._units:
            gate = "relu" if name == CONCEPTS else self._form.gate
            norm = "free" if name == CONCEPTS else self._form.decoder_norm
            bank = SlotBank(
                slots, self.width, zero=True, gate=gate, decoder_norm=norm, writes=name == CONCEPTS
            ).requires_grad_(False)
            checkpoint.load_unit(self._folder, name, bank)
            if name == CONCEPTS and self._writes_apart:
                self.written = bank.W_write * self._scale
            self._units[name] = normalisation.fold(bank.weights(), self._mean, self._scale)
            while len(self._units) > _KEPT:
                self._units.popitem(last=False)
        return self._units[name]


def facts_of(state: RunState, manifest: Manifest, location: str) -> Facts:
    """What a checkpoint says about where its dictionary comes from."""
    training = {
        "step": state.step,
        "updates": state.updates,
        "stage": state.stage,
        "seed": state.seed,
        "data": manifest.digest,
        "rows_digest": f"{state.rows_digest:016x}",
        "damage": state.damage,
    }
    facts = Facts("alignsae", state.dictionary.gate, location, manifest.model, manifest.hook_point, training=training)
    # A slot that was active on no row of its concept has no unit to be steered in.
    known = zip(state.dictionary.concepts, state.gains or [], strict=False)
    facts.gains = {name: gain for name, gain in known if gain > 0}
    return facts


def _slice(weights: BankWeights, begin: int, end: int) -> BankWeights:
    threshold = None if weights.threshold is None else weights.threshold[begin:end]
    return BankWeights(
        weights.W_enc[begin:end], weights.b_enc[begin:end], weights.W_dec[begin:end], threshold, weights.decoder_norm
    )
