"""Reading the files of a run folder, and the rows that it was trained on."""

import json
from collections.abc import Iterator
from contextlib import closing
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
from trainer.stream import DataConfig, Manifest
from trainer.stream.shards import from_stored
from trainer.stream.source import BlockSource

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


def run_shards(run: Path) -> str:
    """Folder or URL of the shards that the run was trained on."""
    return str(run_config(run).data.shards)


def most_norm(run: Path, trained_on: Manifest) -> float | None:
    """The norm above which rows had no weight in the training of the run, None where all had."""
    multiple = run_config(run).data.get("max_norm", 0.0) if RunFolder(run).config.exists() else DataConfig.max_norm
    return trained_on.most_norm(multiple)


def rows_of(folder: str, dictionary: ConceptDictionary, *, match_concepts: bool = True) -> tuple[RowSource, Manifest]:
    """All rows of a shard folder in order, as (activations, concept) batches, and its manifest.

    Raises DataError when its width, or (with match_concepts) its concept names, differ from the dictionary's.
    """
    manifest = Manifest.load(folder)
    if manifest.width != dictionary.width:
        raise DataError(f"{folder}: activations of width {manifest.width}, but the dictionary has {dictionary.width}")
    names = list(manifest.concepts)
    if match_concepts and names != dictionary.concept_names:
        raise DataError(
            f"{folder}: concepts {', '.join(names)} differ from the dictionary's {', '.join(dictionary.concept_names)}"
        )
    return all_rows(folder, manifest, dictionary.mean.device), manifest


def all_rows(folder: str, manifest: Manifest, device: torch.device | str = "cpu") -> RowSource:
    """The rows of a shard folder in order, as (activations, concept) batches, whatever their norms."""

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        with closing(BlockSource(DataConfig(shards=folder, max_norm=0.0), manifest)) as source:
            for index in range(len(manifest.blocks)):
                block = source.rows(index)
                acts = from_stored(block.acts[block.valid], manifest.dtype)
                yield acts.to(device), torch.from_numpy(block.concept[block.valid]).to(device)

    return rows
