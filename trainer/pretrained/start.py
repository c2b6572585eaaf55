"""How a run begins with an imported dictionary: what is taken over, what must agree, and in which units codes are."""

from dataclasses import replace

import torch
from torch import nn

from trainer.dictionary import ChosenForm, DictionaryConfig, DictionaryForm
from trainer.errors import UserError
from trainer.pretrained.folder import Imported, Place
from trainer.stream import Manifest

# Names of the same model elsewhere (TransformerLens).
_ALIASES = {"gpt2-small": "gpt2"}


class Start:
    """The beginning that dictionary.start_from names, for activations of `manifest`.

    Raises UserError, one line, when the folder is not one of `alignsae import`, or is of another width, model or hook
    point.
    """

    def __init__(self, chosen: DictionaryConfig, manifest: Manifest):
        where = f"dictionary.start_from={chosen.start_from}"
        try:
            self.imported = Imported(chosen.start_from)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        facts = self.imported.description.facts
        if self.imported.form.width != manifest.width:
            raise UserError(
                f"{where} has width {self.imported.form.width}, the rows of data.shards have {manifest.width}"
            )
        if facts.model and manifest.model and _model(facts.model) != _model(manifest.model):
            raise UserError(
                f"{where} is of the model {facts.model}, data.shards of {manifest.model}; "
                f"if it is the same under another name, import it again with --model {manifest.model}"
            )
        if facts.hook_point and manifest.hook_point and facts.hook_point != manifest.hook_point:
            raise UserError(
                f"{where} is of the hook point {facts.hook_point}, data.shards of {manifest.hook_point}; "
                f"if it is the same under another name, import it again with --hook-point {manifest.hook_point}"
            )
        self._manifest = manifest
        self._frozen = chosen.freeze == "free"

    @property
    def form(self) -> ChosenForm:
        """What a run that begins here takes over."""
        return self.imported.form

    def fill(self, name: str, unit: nn.Module, form: DictionaryForm) -> None:
        """Set the weights of a unit of a dictionary of this form."""
        mean, scale = torch.tensor(self._manifest.mean), torch.tensor(self._manifest.scale)
        # Slots that stay as they are keep their codes. Slots that are trained on get codes at which the decoder rows
        # have a mean norm of 1, as those of a new dictionary: AdamW's step is as large for an encoder of norm 100 as
        # for a decoder of 0.01.
        gain = 1.0 if self._frozen else self.imported.description.decoder_norm / self._manifest.scale
        self.imported.fill(name, unit, Place(form.bank_slots, mean, scale, gain))


def take_over(chosen: DictionaryConfig, theirs: ChosenForm) -> DictionaryConfig:
    """The section `dictionary` with number of slots, gate and k of the dictionary that the run begins with.

    Raises UserError when it asks for others; what is at its default asks for nothing.
    """
    defaults, changes = ChosenForm(), {}
    for name in ("free_slots", "gate", "k"):
        mine, wanted = getattr(chosen, name), getattr(theirs, name)
        if name == "k" and mine != defaults.k:  # a threshold may be trained towards another number
            continue
        if mine not in (wanted, getattr(defaults, name)):
            raise UserError(
                f"dictionary.{name}={mine}, but dictionary.start_from={chosen.start_from} has {wanted}; leave it out"
            )
        changes[name] = wanted
    return replace(chosen, **changes)


def _model(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2].lower()
    return _ALIASES.get(last, last)
