"""The rows of a unit, a run of documents, at several hook points.

What a unit gives depends on its documents, the settings and the model alone. Windows are read by the model in order
of length, rows come in the order of the input. n rows, D width.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.errors import UserError
from trainer.extraction.windows import Window, Windows, label_array
from trainer.language_model import capture
from trainer.stream.shards import TORCH_DTYPES


class Rows(NamedTuple):
    """Rows as ShardWriter.write takes them: acts [n, D] in the dtype that is stored, concept int64 [n] or [n, M],
    answer int64 [n], token int32 [n, 3]."""

    acts: Tensor
    concept: np.ndarray
    answer: np.ndarray
    token: np.ndarray


@dataclass
class Clock:
    """What the model was given, and how long it took."""

    tokens: int = 0
    model: float = 0.0  # seconds
    total: float = 0.0


@dataclass
class Extractor:
    """Runs the model over units. pad: token id. progress is told, batch by batch, which share of a unit was read."""

    model: Any
    windows: Windows
    pad: int
    clock: Clock = field(default_factory=Clock)
    progress: Callable[[float], Any] = lambda share: None

    def rows(self, documents: Sequence[int], points: Sequence[str]) -> dict[str, Rows]:
        """The rows of a unit at each hook point; no row, of width 0, where none of its tokens is one."""
        windows = list(self.windows.of(documents))
        count = sum(len(window.columns) for window in windows)
        if not count:
            none = np.zeros(0, dtype=np.int64)
            return {point: Rows(torch.empty(0, 0), none, none, np.zeros((0, 3), np.int32)) for point in points}
        acts = self._acts(windows, count, points)
        concept = label_array(windows)
        answer = np.concatenate([np.full(len(w.columns), w.answer) for w in windows])
        token = np.concatenate([_tokens(window) for window in windows])
        return {point: Rows(acts[point], concept, answer, token) for point in points}

    def _acts(self, windows: Sequence[Window], rows: int, points: Sequence[str]) -> dict[str, Tensor]:
        """Activations [n, D] as they are stored, in the order of the rows."""
        settings = self.windows.settings
        dtype = TORCH_DTYPES[settings.dtype]
        firsts = np.cumsum([0, *(len(window.columns) for window in windows)])
        order = sorted(range(len(windows)), key=lambda n: len(windows[n].ids))
        found: dict[str, Tensor] = {}
        read = 0
        for low in range(0, len(order), settings.batch_size):
            batch = order[low : low + settings.batch_size]
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
                    found[point] = torch.empty(rows, acts.shape[2], dtype=dtype)
                found[point][torch.from_numpy(places)] = chosen.to(dtype).cpu()
            self.clock.model += time.perf_counter() - began
            self.clock.tokens += int(lengths.sum())
            read += len(batch)
            self.progress(read / len(order))
        return found

    def _check_length(self, tokens: int) -> None:
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit and tokens > limit:
            settings = self.windows.settings
            what = f"a row of {settings.prompts}" if settings.prompts else f"a window of {settings.context} tokens"
            raise UserError(f"{what} has {tokens} tokens; the model takes {limit}")


def _tokens(window: Window) -> np.ndarray:
    """Token id, document and position of every row, int32 [n, 3]."""
    ids = np.array(window.ids, dtype=np.int32)[window.columns]
    return np.stack([ids, np.full_like(ids, window.document), (window.first + window.columns).astype(np.int32)], axis=1)
