"""Reading the files of a run folder, and the rows that it was trained on."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

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
    """The resolved configuration of a run."""
    path = RunFolder(run).config
    try:
        config = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); is {run} the folder of a training run?") from error
    assert isinstance(config, DictConfig)
    return config


def run_shards(run: Path) -> list[str]:
    """Folders or URLs of the shards that the run was trained on; of several sources, those that name concepts."""
    data = run_config(run).data
    sources = data.get("sources")
    if not sources:
        return [str(data.shards)]
    shards = [str(source.shards) for source in sources.values()]
    return [folder for folder in shards if Manifest.load(folder).concepts] or shards


def most_norm(run: Path, trained_on: Manifest) -> float | None:
    """The norm above which rows had no weight in the training of the run, None where all had."""
    multiple = run_config(run).data.get("max_norm", 0.0) if RunFolder(run).config.exists() else DataConfig.max_norm
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
