"""Units of work: the rows of a run of documents at several hook points, written as a finished shard folder each.

What a unit gives depends on its documents, the arguments and the model alone. Windows are read by the model in order
of length, rows are written in the order of the input. n rows, D width.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tools.extraction.windows import Window, Windows, label_array
from trainer.analysis.language_model import capture
from trainer.errors import UserError
from trainer.stream import ShardSpec, ShardWriter
from trainer.stream.manifest import FILE_NAME
from trainer.stream.normalisation import RunningNormalisation
from trainer.stream.shards import TORCH_DTYPES

Rows = tuple[
    Tensor, np.ndarray, np.ndarray, np.ndarray
]  # acts, concept, answer, token, as ShardWriter.write takes them
STATISTICS = "statistics.npz"
EMPTY = "empty"  # file in place of a manifest: none of the unit's tokens is a row


@dataclass
class Clock:
    """What the model was given, and how long it took."""

    tokens: int = 0
    rows: int = 0
    model: float = 0.0  # seconds
    total: float = 0.0


@dataclass
class Extractor:
    """Runs the model over units. spec: what a manifest says of a hook point and its width. pad: token id."""

    args: argparse.Namespace
    model: Any
    windows: Windows
    pad: int
    spec: Callable[[str, int], ShardSpec]
    clock: Clock = field(default_factory=Clock)

    def write(self, documents: Sequence[int], folders: dict[str, Path], split: str) -> None:
        """Finish one unit at the hook points of `folders`. split: name of its shards.

        Nothing has a final name in a folder before all of it is there.
        """
        began = time.perf_counter()
        windows = list(self.windows.of(documents))
        concept, rows = label_array(windows), sum(len(window.columns) for window in windows)
        if rows:
            acts = self._acts(windows, rows, list(folders))
            answer = np.concatenate([np.full(len(w.columns), w.answer) for w in windows])
            token = np.concatenate([_tokens(window) for window in windows])
            for point, folder in folders.items():
                spec = self.spec(point, acts[point].shape[1])
                self._write(spec, folder, split, (acts[point], concept, answer, token))
        else:
            for folder in folders.values():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / EMPTY).touch()
        self.clock.rows += rows
        self.clock.total += time.perf_counter() - began

    def _write(self, spec: ShardSpec, folder: Path, split: str, rows: Rows) -> None:
        """Shards and statistics of a unit at one hook point; nothing is left of a unit that cannot be finished."""
        size, unknown = self.args.rows_per_block, ([0.0] * spec.width, 1.0)  # the normalisation is that of all units
        acts, concept, answer, token = rows
        statistics = RunningNormalisation(spec.width)
        options = {"rows_per_block": size, "shard_bytes": self.args.shard_mb << 20}
        try:
            with ShardWriter(folder, split, spec, **options, normalisation=unknown, overwrite=True) as writer:
                for low in range(0, len(acts), size):
                    part = slice(low, low + size)
                    writer.write(acts[part], concept[part], answer[part], token[part])
                    statistics.add(acts[part].float().numpy())
                statistics.save(folder / STATISTICS)  # before the manifest, which says that the unit is finished
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise UserError(f"{folder}: cannot be written ({error.strerror}); free some space and rerun") from error
            raise

    def _acts(self, windows: Sequence[Window], rows: int, points: list[str]) -> dict[str, Tensor]:
        """Activations [n, D] as they are stored, in the order of the rows."""
        firsts = np.cumsum([0, *(len(window.columns) for window in windows)])
        order = sorted(range(len(windows)), key=lambda n: len(windows[n].ids))
        found: dict[str, Tensor] = {}
        for low in range(0, len(order), self.args.batch_size):
            batch = order[low : low + self.args.batch_size]
            ids = pad_sequence([torch.tensor(windows[n].ids) for n in batch], batch_first=True, padding_value=self.pad)
            lengths = torch.tensor([len(windows[n].ids) for n in batch])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            self._check_length(ids.shape[1])
            places = np.concatenate([firsts[n] + np.arange(len(windows[n].columns)) for n in batch])
            lines = np.repeat(np.arange(len(batch)), [len(windows[n].columns) for n in batch])
            columns = np.concatenate([windows[n].columns for n in batch])
            began = time.perf_counter()
            seen = capture(self.model, ids.to(self.model.device), mask.to(self.model.device), points)
            for point, acts in seen.items():
                chosen = acts[torch.from_numpy(lines).to(acts.device), torch.from_numpy(columns).to(acts.device)]
                if point not in found:
                    found[point] = torch.empty(rows, acts.shape[2], dtype=TORCH_DTYPES[self.args.dtype])
                found[point][torch.from_numpy(places)] = chosen.to(found[point].dtype).cpu()
            self.clock.model += time.perf_counter() - began
            self.clock.tokens += int(lengths.sum())
        return found

    def _check_length(self, tokens: int) -> None:
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit and tokens > limit:
            what = f"a row of {self.args.prompts}" if self.args.prompts else "a window of --context"
            raise UserError(f"{what} has {tokens} tokens; the model takes {limit}")


def _tokens(window: Window) -> np.ndarray:
    """Token id, document and position of every row, int32 [n, 3]."""
    ids = np.array(window.ids, dtype=np.int32)[window.columns]
    return np.stack([ids, np.full_like(ids, window.document), (window.first + window.columns).astype(np.int32)], axis=1)


def is_finished(folder: Path) -> bool:
    """Whether a unit is complete at one hook point."""
    return (folder / FILE_NAME).exists() or (folder / EMPTY).exists()


def joined(units: Sequence[Path]) -> RunningNormalisation:
    """What is known of the rows of finished units together, merged in their order."""
    total, *others = (RunningNormalisation.load(unit / STATISTICS) for unit in units)
    for other in others:
        total.merge(other)
    return total
