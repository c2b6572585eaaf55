"""The manifest of rows that are computed while a dictionary trains on them, made before any of them is there.

The rows of every unit are counted by making its tokens; ranks share that. Mean and scale are measured on a sample of
units by the main rank, in the order of units, so that the manifest is the same for any number of ranks.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from trainer.agreement import AgreedError, decide, require_agreement
from trainer.errors import UserError
from trainer.extraction.documents import open_documents, unit_name
from trainer.extraction.live import SPLIT, LiveRows, Models, Origin, settings_of
from trainer.stream import ComputedBlock, DataConfig, Manifest
from trainer.stream.digest import mix64
from trainer.stream.manifest import FILE_NAME
from trainer.stream.normalisation import MAX_NORM, RunningNormalisation
from trainer.topology import Topology


class UnitSize(NamedTuple):
    """Rows of a unit, and the most concepts that one of them lists."""

    rows: int
    labels: int


@dataclass(frozen=True)
class Live:
    """What computes the live sources of a run, by name, and their manifests.

    made: names of those whose manifest is new and not stored yet.
    """

    computers: dict[str, LiveRows]
    made: tuple[str, ...]

    @property
    def manifests(self) -> dict[str, Manifest]:
        """By name."""
        return {name: computer.manifest for name, computer in self.computers.items()}

    def store(self, folder: Callable[[str], Path]) -> None:
        """Write the new manifests into the folders of their sources. Raises OSError."""
        for name in self.made:
            folder(name).mkdir(parents=True, exist_ok=True)
            self.computers[name].manifest.save(folder(name))


def open_live(data: DataConfig, stored: Callable[[str], Path], topology: Topology) -> Live:
    """Open all live sources; a manifest that is neither named nor stored is made. Writes nothing. Called on all ranks.

    stored: the folder of a source's manifest in the run folder. Raises UserError, one line, where texts, model or hook
    point are missing, or are others than a manifest was made from; AgreedError where the main rank says so.
    """
    origins: dict[str, Origin] = {}
    problem, models = "", Models(topology)
    try:
        for name, live in data.computed().items():
            key = f"data.sources.{name}.live" if name else "data.live"
            documents = open_documents(settings_of(live))  # first: it is soon known whether they can be read
            origins[name] = Origin.open(key, live, documents, models)
    except UserError as error:
        problem = str(error)
    decide(problem if topology.is_main else "", topology)
    if problem:
        raise UserError(problem)
    require_agreement(
        {f"{one.key}.{name}": str(value) for one in origins.values() for name, value in one.made_from.items()}, topology
    )
    manifests = {name: _stored(origin, stored(name), topology) for name, origin in origins.items()}
    made = tuple(name for name, manifest in manifests.items() if manifest is None)
    known = {name: manifest or make_manifest(origins[name], topology) for name, manifest in manifests.items()}
    return Live({name: LiveRows(origins[name], manifest) for name, manifest in known.items()}, made)


def _stored(origin: Origin, folder: Path, topology: Topology) -> Manifest | None:
    """The manifest that the configuration names or that the run has already, read by the main rank."""
    text, problem = b"", ""
    where = origin.config.manifest or (folder if (folder / FILE_NAME).exists() else "")
    if topology.is_main and where:
        try:
            manifest = Manifest.load(where)
            origin.refuse_other(manifest, f"{where}/{FILE_NAME}")
            text = manifest.to_json().encode()
        except UserError as error:
            problem = str(error)
    return _agreed(text, problem, topology)


def make_manifest(origin: Origin, topology: Topology) -> Manifest:
    """The manifest of rows that no one has computed yet. Called on all ranks."""
    sizes = count_rows(origin, topology)
    text, problem = b"", ""
    if topology.is_main:
        try:
            text = _with_sample(origin, sizes).to_json().encode()
        except UserError as error:
            problem = str(error)
    found = _agreed(text, problem, topology)
    assert found is not None
    return found


def _agreed(text: bytes, problem: str, topology: Topology) -> Manifest | None:
    """The main rank's manifest on all ranks; None where it has none. Raises AgreedError with its problem."""
    decide(problem, topology)
    said = topology.share(text)[0]
    return Manifest.parse(said, FILE_NAME) if said else None


def count_rows(origin: Origin, topology: Topology) -> list[UnitSize]:
    """The sizes of all units; each rank makes the tokens of every world-th. Called on all ranks."""
    units, found, problem = origin.documents.units[SPLIT], {}, ""
    mine = range(topology.rank, len(units), topology.world)
    try:
        for number in tqdm(mine, desc=f"{origin.key}: tokens", unit="unit", disable=not topology.is_main):
            windows = list(origin.extractor.windows.of(units[number]))
            labels = max((len(row) for window in windows for row in window.labels), default=1)
            found[number] = (sum(len(window.columns) for window in windows), labels)
    except UserError as error:
        problem = str(error)
    everyone = [json.loads(text) for text in topology.share(json.dumps([problem, list(found.items())]).encode())]
    for said, _ in everyone:
        if said:
            raise AgreedError(said)
    sizes: Mapping[int, list[int]] = dict(pair for _, pairs in everyone for pair in pairs)
    return [UnitSize(*sizes[number]) for number in range(len(units))]


def sampled_units(sizes: list[UnitSize], rows: int) -> list[int]:
    """Units that hold at least so many rows together, spread at random over all of them; ascending."""
    order = np.argsort(mix64(np.arange(len(sizes), dtype=np.uint64)))
    before = np.cumsum([0, *(sizes[number].rows for number in order)])[:-1]
    return sorted(int(number) for number in order[before < rows] if sizes[number].rows)


def _with_sample(origin: Origin, sizes: list[UnitSize]) -> Manifest:
    """The manifest of units of these sizes, mean and scale measured on some of them."""
    config, documents = origin.config, origin.documents
    blocks = [
        ComputedBlock(f"{unit_name(SPLIT, number)}-000000-000000", size.rows)
        for number, size in enumerate(sizes)
        if size.rows
    ]
    if not blocks:
        raise UserError(f"{origin.key}: none of the tokens is a row; check skip_first and drop_special")
    statistics: RunningNormalisation | None = None
    units = sampled_units(sizes, config.sample)
    for number in tqdm(units, desc=f"{origin.key}: mean and scale", unit="unit"):
        acts = origin.unit(number).acts
        own = RunningNormalisation(acts.shape[1])
        own.add(acts.float().numpy())
        if statistics is None:
            statistics = own
        else:
            statistics.merge(own)
    assert statistics is not None
    mean, scale = statistics.result(origin.key)
    return Manifest(
        width=statistics.width,
        dtype=config.dtype,
        concepts=documents.concepts,
        answers=documents.answers,
        model=config.model,
        hook_point=config.hook,
        extra={
            **origin.made_from,
            "norms": statistics.norms.report(MAX_NORM),
            "sample": {"units": len(units), "rows": statistics.rows},
        },
        mean=mean,
        scale=scale,
        rows=sum(block.rows for block in blocks),
        shards=(),
        computed=tuple(blocks),
        concepts_per_row=max(size.labels for size in sizes),
        median_norm=statistics.median_norm,
    )
