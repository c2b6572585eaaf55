"""Reading the files of a run folder, and the rows that it was trained on."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from trainer.analysis.rows import RowSource
from trainer.dictionary import ConceptDictionary
from trainer.errors import DataError, UserError
from trainer.files import read_json
from trainer.run_folder import RunFolder
from trainer.stream import DataConfig, Manifest, Sources
from trainer.stream.shards import from_stored
from trainer.stream.source import BlockSource
from trainer.stream.sources import relabelled

MAX_RESULT = 1 << 30  # bytes; an evaluation holds a matrix of concepts x concepts


def read_result(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object that a tool wrote. Raises DataError with `remedy` (what to do) when it is not there or none."""
    return read_json(path, dict[str, Any], remedy, limit=MAX_RESULT)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl by step; of a step that was trained twice (after a resume) the later line counts."""
    path = RunFolder(run).metrics
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); is {run} the folder of a training run?") from error
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)  # not parse_json: a journal may hold NaN
            by_step[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut short
    return [by_step[step] for step in sorted(by_step)]


def run_config(run: Path) -> DictConfig:
    """The resolved configuration of a run, or of the run that a checkpoint is of."""
    path = RunFolder.around(run).config
    try:
        config = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); is {run} the folder of a training run?") from error
    assert isinstance(config, DictConfig)
    return config


def run_shards(run: Path) -> list[str]:
    """Folders or URLs of the shards that the run was trained on; of several sources, those that name concepts.

    Raises UserError for a run whose rows were all computed (data.live).
    """
    data = run_config(run).data
    sources = data.get("sources")
    shards = [str(source.shards) for source in sources.values() if source.shards] if sources else [str(data.shards)]
    if not any(shards):
        raise UserError(
            f"{run} was trained on rows that were computed (data.live); `alignsae extract` some for --train"
        )
    if not sources:
        return shards
    return [folder for folder in shards if Manifest.load(folder).concepts] or shards


def run_heldout(run: Path) -> tuple[list[str], list[str]]:
    """Folders or URLs of the held-out rows of a run (data.heldout): those that name concepts, and the others, text that
    slots are to be silent on; where none names concepts, all are the first."""
    data = run_config(run).data
    sources = data.get("sources") or {"": data}
    folders = [str(source.heldout) for source in sources.values() if source.get("heldout")]
    named = [folder for folder in folders if Manifest.load(folder).concepts]
    return (named, [folder for folder in folders if folder not in named]) if named else (folders, [])


def most_norm(run: Path, trained_on: Manifest) -> float | None:
    """The norm above which rows had no weight in the training of the run, None where all had."""
    multiple = (
        run_config(run).data.get("max_norm", 0.0) if RunFolder.around(run).config.exists() else DataConfig.max_norm
    )
    return trained_on.most_norm(multiple)


def rows_of(
    folders: Sequence[str], dictionary: ConceptDictionary, *, match_concepts: bool = True
) -> tuple[RowSource, Sources]:
    """All rows of shard folders in order, as (activations, concept) batches, and the folders' manifests.

    With match_concepts the labels are the numbers of the dictionary's concepts, otherwise those of the manifests'.
    Raises DataError for another width, and with match_concepts for concepts that the dictionary does not have.
    """
    sources = Sources({folder: Manifest.load(folder) for folder in folders})
    for folder, manifest in sources.manifests.items():
        if manifest.width != dictionary.width:
            raise DataError(
                f"{folder}: activations of width {manifest.width}, but the dictionary has {dictionary.width}"
            )
        if match_concepts and (unknown := [n for n in manifest.concepts if n not in dictionary.concept_names]):
            raise DataError(
                f"{folder}: concepts {', '.join(unknown)} are not among the dictionary's "
                f"{', '.join(dictionary.concept_names)}"
            )
    common = dictionary.concept_names if match_concepts else sources.manifest.concepts
    each = [
        all_rows(folder, manifest, dictionary.mean.device, common) for folder, manifest in sources.manifests.items()
    ]
    return (lambda: chain.from_iterable(rows() for rows in each)), sources


def documents_of(folders: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """How many documents the rows of each concept are from; empty where a shard does not say it of its rows."""
    found: set[tuple[int, int, int]] = set()
    for number, folder in enumerate(folders):
        manifest = Manifest.load(folder)
        with closing(BlockSource(DataConfig(shards=folder, max_norm=0.0), manifest)) as source:
            for index in range(len(manifest.blocks)):
                origin = source.origin(index)
                if origin is None:
                    return {}
                for concept in relabelled(source.rows(index).concept, manifest.concepts, names).T:
                    pairs = np.unique(np.stack([concept, origin[:, 1]])[:, concept >= 0], axis=1)
                    found.update((number, *pair) for pair in pairs.T.tolist())
    counts = Counter(concept for _, concept, _ in found)
    return {name: counts[concept] for concept, name in enumerate(names)}


def all_rows(
    folder: str, manifest: Manifest, device: torch.device | str = "cpu", concepts: Sequence[str] | None = None
) -> RowSource:
    """The rows of a shard folder in order, as (activations, concept) batches, whatever their norms.

    concepts: names that the labels are to number, the manifest's among them; None: the manifest's.
    """
    common = manifest.concepts if concepts is None else concepts

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        with closing(BlockSource(DataConfig(shards=folder, max_norm=0.0), manifest)) as source:
            for index in range(len(manifest.blocks)):
                block = source.rows(index)
                acts = from_stored(block.acts[block.valid], manifest.dtype)
                concept = relabelled(block.concept[block.valid], manifest.concepts, common)
                yield acts.to(device), torch.from_numpy(concept).to(device)

    return rows
