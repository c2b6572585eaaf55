"""Rows that are computed while a dictionary trains on them: `data.live`.

A block is known by its unit and its place in it. Whoever needs a block computes its unit as `alignsae extract` does, so
the rows are those that shards would hold. A manifest made here has one block per unit; one of an extraction may have
several, and then a unit is computed once for each (unless they are asked for one after the other).
"""

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.extraction.documents import Documents, unit_of
from trainer.extraction.identity import identity
from trainer.extraction.rows import Extractor, Rows
from trainer.extraction.settings import COMPUTE, Settings
from trainer.extraction.windows import Windows
from trainer.language_model import load_language_model, module_at
from trainer.stream import ComputedRows, LiveConfig, Manifest
from trainer.stream.shards import to_stored
from trainer.topology import Topology

log = logging.getLogger(__name__)
_KEEP = 2  # units
SPLIT = "train"


@dataclass
class Model:
    """A language model on the device of this process. lock: held while it runs."""

    model: Any
    tokenizer: Any
    lock: threading.Lock = field(default_factory=threading.Lock)


class Models:
    """Language models of this process, each of them loaded once."""

    def __init__(self, topology: Topology):
        self._topology = topology
        self._loaded: dict[tuple[str, str, str], Model] = {}

    def load(self, config: LiveConfig) -> Model:
        """The model of a live source. Raises UserError when it cannot be read."""
        if config.device_map and self._topology.world > 1:
            raise UserError("data.live.device_map=auto takes all devices: start one process")
        key = (config.model, config.precision, config.device_map)
        if key not in self._loaded:
            device, dtype = self._topology.device, COMPUTE[config.precision]
            model, tokenizer = load_language_model(config.model, device, dtype, config.device_map or None)
            self._loaded[key] = Model(model, tokenizer)
        return self._loaded[key]


@dataclass
class Origin:
    """What the rows of a live source are computed from. key: the section of the configuration that says so."""

    key: str
    config: LiveConfig
    documents: Documents
    model: Model
    extractor: Extractor
    made_from: dict[str, Any]

    @classmethod
    def open(cls, key: str, config: LiveConfig, documents: Documents, models: Models) -> "Origin":
        """Read model and input. Raises UserError for all that can be known to be wrong before the model runs."""
        settings = settings_of(config)
        model = models.load(config)
        try:
            module_at(model.model, config.hook)
        except UserError as error:
            raise UserError(f"{key}.hook: {error}") from error
        extractor = Extractor(model.model, Windows(settings, documents, model.tokenizer), model.tokenizer.pad_token_id)
        return cls(key, config, documents, model, extractor, identity(settings, model.model))

    def unit(self, number: int) -> Rows:
        """Compute the rows of a unit."""
        with self.model.lock:
            return self.extractor.rows(self.documents.units[SPLIT][number], [self.config.hook])[self.config.hook]

    def refuse_other(self, manifest: Manifest, where: str) -> None:
        """Raise UserError unless a manifest is of the rows that are computed here."""
        ours = {**self.made_from, "hook": self.config.hook}
        theirs = {**manifest.extra, "hook": manifest.hook_point}
        for name, value in ours.items():
            if theirs.get(name) == value:
                continue
            said = {
                "weights": f"{self.key}.model={self.config.model} has other weights",
                "input": f"{self.extractor.windows.settings.input} holds other texts",
            }.get(name, f"{self.key}.{name} is {value!r}, there it is {theirs.get(name)!r:.80}")
            raise UserError(f"{self.key}: {said} than {where} was made from; restore it, or let a new run make its own")


class LiveRows:
    """Computes the blocks of a manifest. Thread-safe.

    Raises UserError when its blocks are not those of units of the origin.
    """

    def __init__(self, origin: Origin, manifest: Manifest):
        self.origin, self.manifest = origin, manifest
        units = [unit_of(key) for key in manifest.keys]
        if not all(0 <= unit < len(origin.documents.units[SPLIT]) for unit in units):
            raise UserError(f"{origin.key}: the blocks of its manifest are not units of an extraction; extract again")
        self._places: list[tuple[int, int]] = []  # by block: unit, first row within it
        first: dict[int, int] = {}
        for unit, rows in zip(units, manifest.block_rows.tolist(), strict=True):
            self._places.append((unit, first.get(unit, 0)))
            first[unit] = first.get(unit, 0) + rows
        self._rows_of_unit = first
        self._units: OrderedDict[int, Rows] = OrderedDict()
        self._lock = threading.Lock()
        if len(first) < len(units):
            log.warning(
                "%s: %.1f blocks of the manifest share a unit, which is computed once for each; extract with a smaller "
                "--unit-kb, or more --rows-per-block",
                origin.key, len(units) / len(first),
            )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens that the model has read so far."""
        return self.origin.extractor.clock.tokens

    def rows(self, index: int) -> ComputedRows:
        """The rows of a block. Raises UserError when the unit gives another number of rows."""
        unit, first = self._places[index]
        found = self._unit(unit)
        count, whole = int(self.manifest.block_rows[index]), len(found.acts)
        if whole != self._rows_of_unit[unit]:
            raise UserError(f"{self.where(index)} gives {whole} rows, the manifest says {self._rows_of_unit[unit]}")
        part = slice(first, first + count)
        acts = found.acts[part] if count == whole else found.acts[part].clone()  # a view would hold the whole unit
        return ComputedRows(to_stored(acts, self.manifest.dtype), found.concept[part], found.answer[part])

    def where(self, index: int) -> str:
        """Unit and input, for messages."""
        return f"{self.origin.key}: unit {self._places[index][0]} of {self.origin.extractor.windows.settings.input}"

    def _unit(self, number: int) -> Rows:
        with self._lock:
            if (known := self._units.get(number)) is not None:
                return known
            found = self._units[number] = self.origin.unit(number)
            while len(self._units) > _KEEP:
                self._units.popitem(last=False)
            return found


def settings_of(config: LiveConfig) -> Settings:
    """As an extraction knows them."""
    own = {field.name: getattr(config, field.name) for field in fields(Settings) if hasattr(config, field.name)}
    for name in ("texts", "prompts"):
        own[name] = Path(own[name]).expanduser() if own[name] else None
    return Settings(**own)
