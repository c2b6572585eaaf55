"""Documents as windows of tokens: which of them become rows, and with which labels.

n rows of a window, M concepts of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.extraction.documents import Documents
from trainer.extraction.settings import OUTSIDE, Settings
from trainer.labels import NONE, UNKNOWN
from trainer.language_model import Example, chat_text


@dataclass(frozen=True)
class Window:
    """Tokens that the model reads together.

    ids: token ids. columns [n]: which of them are rows. labels: per row its concepts, or [-1] (unknown) or [-2] (none
    of them). answer: label of every row. document, first: number of the document, and place in it of ids[0].
    """

    ids: list[int]
    columns: np.ndarray
    labels: list[list[int]]
    answer: int
    document: int
    first: int


class Windows:
    """Windows of documents for a tokenizer and settings."""

    def __init__(self, settings: Settings, documents: Documents, tokenizer: Any):
        self.settings, self.documents, self.tokenizer = settings, documents, tokenizer
        self._concepts = {name: index for index, name in enumerate(documents.concepts)}
        self._answers = {name: index for index, name in enumerate(documents.answers)}
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)

    def of(self, indices: Sequence[int]) -> Iterator[Window]:
        """Windows of these documents, in order."""
        examples = [self.documents.read(index) for index in indices]
        encoded: dict[int, tuple[list[int], Any]] = {}
        # Together, so that the tokenizer can use several threads.
        for chat in (False, True):
            chosen = [n for n, example in enumerate(examples) if bool(example.messages) == chat]
            texts = [self._text(examples[n], indices[n]) for n in chosen]
            if not chosen:
                continue
            spans = any(examples[n].spans for n in chosen)
            if spans and not self.tokenizer.is_fast:
                raise UserError("spans need a fast tokenizer, which says where its tokens are in the text")
            found = self.tokenizer(texts, add_special_tokens=not chat, return_offsets_mapping=spans)
            offsets = found["offset_mapping"] if spans else [None] * len(chosen)
            encoded |= dict(zip(chosen, zip(found["input_ids"], offsets, strict=True), strict=True))
        for n, example in enumerate(examples):
            yield from self._windows(example, indices[n], *encoded[n])

    def _text(self, example: Example, index: int) -> str:
        if not example.messages:
            return example.prompt or example.text
        return chat_text(self.tokenizer, example.messages, self.documents.where(index))

    def _windows(self, example: Example, index: int, ids: list[int], offsets: Any) -> Iterator[Window]:
        row_label = self._label(example.names)
        lost = example.names and row_label == [UNKNOWN]  # by --concepts
        answer = -1 if lost else self._answers.get(example.answer, -1)
        if not example.text:
            if not ids:
                raise UserError(f"{self.documents.where(index)}: the tokenizer makes no token of it")
            yield Window(ids, np.array([len(ids) - 1]), [row_label], answer, index, 0)
            return
        for first in range(0, len(ids), self.settings.context):
            window = ids[first : first + self.settings.context]
            columns = np.arange(min(self.settings.skip_first, len(window)), len(window))
            if self.settings.drop_special:
                columns = columns[~np.isin(np.array(window, dtype=np.int64)[columns], self._special)]
            if example.spans is None:
                labels = [row_label] * len(columns)
            else:
                labels = [self._inside(example, *offsets[first + column]) for column in columns.tolist()]
            yield Window(window, columns, labels, answer, index, first)

    def _label(self, names: Sequence[str] | None) -> list[int]:
        """Labels of a row of these concepts; of those that --concepts leaves out nothing is known."""
        if names is None:
            return [UNKNOWN]
        return [self._concepts[name] for name in names if name in self._concepts] or [UNKNOWN if names else NONE]

    def _inside(self, example: Example, start: int, end: int) -> list[int]:
        """Labels of the token of characters [start, end)."""
        names = dict.fromkeys(s.concept for s in example.spans or () if s.start < end and start < s.end)
        return self._label(tuple(names)) if names else [OUTSIDE[self.settings.outside]]


def label_array(windows: Sequence[Window]) -> np.ndarray:
    """Labels [n] of the rows of windows, or [n, M] where one has M > 1, padded with -1."""
    labels = [row for window in windows for row in window.labels]
    most = max(map(len, labels), default=1)
    if most == 1:
        return np.array([row[0] for row in labels], dtype=np.int64)
    return np.array([row + [UNKNOWN] * (most - len(row)) for row in labels], dtype=np.int64)
