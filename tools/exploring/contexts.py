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
        self._text = _Texts(decode or (lambda token: f"[{token}]"))

    def show(self, rows: Tensor, values: Tensor, windows: Tensor | None, most: Tensor) -> list[list[dict[str, Any]]]:
        """What a page says of the rows [n, k] of n slots: r row, v activation, l labels, d document, p position; t
        tokens, a their levels of activation as digits, f which of them is the row. Rows below 0 are none.

        values: [n, k]; windows: activations [n, k, 2w + 1] around the rows, None where nobody looks around; most: [n],
        of level 9.
        """
        there = rows >= 0
        number, half = rows[there].numpy(), 0 if windows is None else windows.shape[2] // 2
        rounded = values[there].double().numpy().round(4).tolist()
        items: list[dict[str, Any]] = [{"r": row, "v": v} for row, v in zip(number.tolist(), rounded, strict=True)]
        for item, labels in zip(items, self._labels[number].tolist(), strict=True):
            if concepts := [self._names[label] for label in labels if label >= 0]:
                item["l"] = concepts
        if self._origins is not None:
            levels = None
            if windows is not None:
                level = LEVELS * windows[there].float() / most[:, None].expand_as(rows)[there][:, None].clamp_min(1e-9)
                levels = level.ceil().clamp(0, LEVELS).to(torch.uint8).numpy()
            self._add_tokens(items, number, self._origins, half, levels)
        ends = there.sum(dim=1).cumsum(0).tolist()
        return [items[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def _add_tokens(
        self, items: list[dict[str, Any]], number: np.ndarray, origins: np.ndarray, half: int, levels: np.ndarray | None
    ) -> None:
        """Add the tokens around rows number [m]; levels: [m, 2 half + 1], None: all 0."""
        offsets = np.arange(-half, half + 1)
        near = number[:, None] + offsets
        inside = (near >= 0) & (near < len(origins))
        around, own = origins[near.clip(0, len(origins) - 1)], origins[number]
        # A neighbour is as many tokens away in the same document as it is rows away.
        beside = inside & (around[..., 1] == own[:, None, 1]) & (around[..., 2] - own[:, None, 2] == offsets)
        digits = np.full(near.shape, ord("0"), np.uint8) if levels is None else levels + np.uint8(ord("0"))
        text, before = self._text, beside[:, :half].sum(axis=1).tolist()
        for place, (item, (_, document, position)) in enumerate(zip(items, own.tolist(), strict=True)):
            mask = beside[place]
            tokens = [text[token] for token in around[place, mask, 0].tolist()]
            item |= {"d": document, "p": position, "f": before[place], "t": tokens}
            item["a"] = digits[place, mask].tobytes().decode("ascii")
            if len(tokens) == 1 and document < len(self._prompts):
                prompt = self._prompts[document].removesuffix(tokens[0])[-400:]
                item |= {"t": [prompt, tokens[0]], "a": f"0{LEVELS}", "f": 1}

    def peak(self, row: int) -> str:
        """The token of a row, "" where it is not known."""
        return "" if self._origins is None or row < 0 else self.text(int(self._origins[row, 0]))

    def text(self, token: int) -> str:
        """The text of a token."""
        return self._text[token]


class _Texts(dict[int, str]):
    """Token -> its text, decoded when it is first asked for."""

    def __init__(self, decode: Callable[[int], str]):
        super().__init__()
        self._decode = decode

    def __missing__(self, token: int) -> str:
        self[token] = text = self._decode(token)[:LONGEST]
        return text
