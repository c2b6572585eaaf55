"""A trained dictionary with what is known about it: read from a run, a checkpoint, an export or an import.

Shapes: B rows, D model width, S slots.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from trainer import checkpoint
from trainer.dictionary import ConceptDictionary, DictionaryConfig, OutputBias, SlotBank, bank_number
from trainer.errors import UserError
from trainer.pretrained import folder as imported
from trainer.pretrained.formats import FOLDERS
from trainer.pretrained.locate import open_source
from trainer.pretrained.own import facts_of
from trainer.pretrained.source import Facts, Source
from trainer.stream.location import is_remote, local_path


@dataclass
class Trained:
    """A dictionary, frozen, and where it comes from.

    Codes z [B, S] are fp32, with the concept slots first: slot r is concepts[r].
    """

    dictionary: ConceptDictionary
    facts: Facts

    @property
    def concepts(self) -> list[str]:
        """Names of the first slots. (In an export or import they are slots like others, in a run a bank of their
        own.)"""
        return self.dictionary.concept_names or self.facts.concepts

    @property
    def gains(self) -> dict[str, float]:
        """Concept -> mean activation of its slot on the rows of the concept; without those that nobody measured."""
        return self.facts.gains

    @property
    def hook_point(self) -> str:
        """Where in the language model its activations are: blocks.L.hook_resid_post."""
        return self.facts.hook_point

    @property
    def model(self) -> str:
        """The language model that its activations came from, as the shards name it."""
        return self.facts.model

    @property
    def width(self) -> int:
        """D."""
        return self.dictionary.width

    @property
    def slots(self) -> int:
        """S."""
        return self.dictionary.slots

    def encode(self, raw: Tensor) -> Tensor:
        """Code z [B, S] of raw activations [B, D] of any float dtype."""
        return self.dictionary.encode(raw)

    def decode(self, z: Tensor) -> Tensor:
        """Raw activations [B, D] fp32 of a code z [B, S]."""
        return self.dictionary.decode(z)

    def to(self, device: torch.device | str) -> "Trained":
        """Move to a device; returns itself."""
        self.dictionary.to(device)
        return self

    def slot(self, name: str | int) -> int:
        """Number of the slot of a concept, or of any slot given by number. Raises UserError for one that is not
        there."""
        if isinstance(name, str) and name in self.concepts:
            return self.concepts.index(name)
        if isinstance(name, int) or name.isdecimal():
            if 0 <= int(name) < self.slots:
                return int(name)
            raise UserError(f"slot {name} does not exist: the dictionary has slots 0 to {self.slots - 1}")
        near = get_close_matches(name, self.concepts, n=1)
        known = ", ".join(self.concepts[:20]) or "none"
        hint = f"did you mean {near[0]}?" if near else f"the concepts are {known:.300}"
        raise UserError(f"no concept {name!r}; {hint}")


def read_trained(path: str | Path) -> Trained:
    """The dictionary of a run, a checkpoint, an import or an export.

    path: a run folder (its newest checkpoint is read), a checkpoint folder, `checkpoints/latest`, a folder of
    `alignsae import`, or one of `alignsae export` or SAELens with a threshold for each slot; or the URL of an export
    (`hf://OWNER/NAME`, any protocol of fsspec). Raises UserError when there is none, DataError when it is damaged.
    """
    if is_remote(str(path)):
        with TemporaryDirectory() as scratch:
            source = open_source(str(path), Path(scratch))
            return Trained(_whole(source), source.facts)
    path = local_path(str(path))
    if (path / imported.FILE_NAME).is_file():
        return Trained(imported.load(path), imported.Imported(path).description.facts)
    for name, read in FOLDERS.items():
        if (path / name).is_file():
            source = read(path, str(path))
            return Trained(_whole(source), source.facts)
    folder, _ = checkpoint.find(str(path), path)
    assert folder is not None  # a named path that has none raises
    dictionary, manifest = checkpoint.load_dictionary(folder)
    facts = facts_of(checkpoint.read_state(folder), manifest, str(path))
    facts.concepts = dictionary.concept_names
    stated = manifest.extra.get("token_position")  # which `alignsae extract` writes
    facts.training["token_position"] = stated if isinstance(stated, str) else ""
    return Trained(dictionary, facts)


def _whole(source: Source) -> ConceptDictionary:
    """The slots of a source as free slots."""
    if source.top_k is not None:
        raise UserError(
            f"{source.facts.location} keeps the {source.top_k} largest of each row; `alignsae import` finds a threshold"
        )
    chosen = DictionaryConfig(free_slots=source.slots)
    if source.bank(0, 1).threshold is not None:
        chosen.gate = "jumprelu"
    dictionary = ConceptDictionary(chosen.form(source.width), on_unit=partial(_fill, source, chosen.bank_slots))
    dictionary.written = source.written
    return dictionary.eval().requires_grad_(False)


@torch.no_grad()
def _fill(source: Source, bank_slots: int, name: str, unit: nn.Module) -> None:
    number = bank_number(name)
    if isinstance(unit, OutputBias):
        unit.b_dec.copy_(source.output_bias())
    elif isinstance(unit, SlotBank) and number is not None:
        begin = number * bank_slots
        unit.begin_at(source.bank(begin, begin + unit.slots))
