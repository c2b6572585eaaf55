"""Contexts of rows as text: tokens around a row where the shards say which tokens rows are of."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

LONGEST = 40  # characters of a token
LEVELS = 9  # of highlighting, 0 for an activation of 0


class Contexts:
    """Shows rows.

    Args:
        origins: [N, 3] int32 of all rows, token id, document, position; None where the shards do not say.
        labels: [N, M] int32 of all rows (trainer.labels).
        names: of the concepts.
        decode: token id -> text; None where there is no tokenizer.
        prompts: text of a document by number, for rows whose neighbours are no rows; may be empty.
    """

    def __init__(
        self,
        origins: np.ndarray | None,
        labels: np.ndarray,
        names: list[str],
        decode: Callable[[int], str] | None,
        prompts: list[str],
    ):
        self._origins, self._labels, self._names, self._prompts = origins, labels, names, prompts
        self._decode = decode or (lambda token: f"[{token}]")
        self._known: dict[int, str] = {}

    def show(self, row: int, value: float, window: Tensor | None, most: float) -> dict[str, Any]:
        """What a page says of a row: r row, v activation, l labels, d document, p position; t tokens, a their levels of
        activation as digits, f which of them is the row."""
        shown: dict[str, Any] = {"r": row, "v": round(value, 4)}
        concepts = [self._names[number] for number in self._labels[row].tolist() if number >= 0]
        if concepts:
            shown["l"] = concepts
        if self._origins is None:
            return shown
        token, document, position = self._origins[row].tolist()
        shown |= {"d": document, "p": position}
        half = 0 if window is None else len(window) // 2
        near = [r for r in range(row - half, row + half + 1) if self._beside(r, row)]
        if len(near) == 1 and document < len(self._prompts):
            shown |= {"t": [self._prompts[document][-400:], self.text(token)], "a": f"0{LEVELS}", "f": 1}
            return shown
        around = torch.zeros(2 * half + 1) if window is None else window.float()
        levels = (LEVELS * around / max(most, 1e-9)).ceil().clamp(0, LEVELS).int().tolist()
        shown["t"] = [self.text(int(self._origins[r, 0])) for r in near]
        shown["a"] = "".join(str(levels[r - row + half]) for r in near)
        shown["f"] = near.index(row)
        return shown

    def peak(self, row: int) -> str:
        """The token of a row, "" where it is not known."""
        return "" if self._origins is None or row < 0 else self.text(int(self._origins[row, 0]))

    def _beside(self, near: int, row: int) -> bool:
        """Whether a row is as many tokens away in the document as it is rows away."""
        origins = self._origins
        if origins is None or not 0 <= near < len(origins):
            return False
        return bool(origins[near, 1] == origins[row, 1] and origins[near, 2] - origins[row, 2] == near - row)

    def text(self, token: int) -> str:
        """The text of a token."""
        if token not in self._known:
            self._known[token] = self._decode(token)[:LONGEST]
        return self._known[token]
