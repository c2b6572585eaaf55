"""Edits of the activations at a hook point of a running model, at any of its tokens.

B sequences, T tokens of a forward pass, D width at the hook point.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.language_model.capture import block_part, module_at, output_of
from trainer.language_model.loading import last_token


@dataclass(frozen=True)
class Tokens:
    """Which tokens of B sequences a forward pass is about.

    start: columns that earlier passes left in the cache. prompt: columns of the prompt, which is what the first pass
    read. last [B] int64: column of the last token of each prompt. real [B, T]: False at padding; None: all are real.
    """

    start: int
    prompt: int
    last: Tensor
    real: Tensor | None

    def columns(self, count: int) -> Tensor:
        """The columns [T] of the tokens of this pass, of which there are `count`."""
        return torch.arange(self.start, self.start + count, device=self.last.device)


Edit = Callable[[Tensor], Tensor]  # of activations [B, D], one of each sequence
EditTokens = Callable[[Tensor, Tokens], Tensor]


class _Passes:
    """Tells the pass over a prompt from those that go on from it."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None  # of the newest pass without a cache
        self._prompt, self._last = 0, torch.zeros(0)
        self._start = 0
        self._mask: Tensor | None = None
        self._cache: Any = None  # of the newest pass, and how many tokens it has read since
        self._in_cache = 0

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the model's forward pass."""
        # By what it does: versions of transformers call the argument past_key_values or cache.
        cache = next((value for value in kwargs.values() if hasattr(value, "get_seq_length")), None)
        mask = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._start = 0 if cache is None else self._length(cache)
        self._cache, self._in_cache = cache, self._start + (0 if ids is None else ids.shape[1])
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        # Without a cache `generate` reads everything again, one token longer each time.
        longer = cache is None and ids is not None and self._ids is not None and _goes_on(self._ids, ids)
        if self._start == 0:
            if not longer:
                self._prompt = 0
            self._ids = ids if cache is None else None

    def _length(self, cache: Any) -> int:
        try:
            return int(cache.get_seq_length())
        except ValueError:  # recurrent states alone do not say
            return self._in_cache if cache is self._cache else 0

    def tokens(self, h: Tensor) -> Tokens:
        """What this pass is about, seen from a hook point with activations h [B, T, D]."""
        count, mask = h.shape[1], self._mask
        real = None if mask is None else mask[:, self._start : self._start + count].to(h.device).bool()
        if self._start == 0 and not self._prompt:
            self._prompt = count
            end = torch.full((len(h),), count - 1, device=h.device)
            self._last = end if real is None else last_token(real)
        return Tokens(self._start, self._prompt, self._last, real)


def _goes_on(old: Tensor, new: Tensor) -> bool:
    return new.shape == (old.shape[0], old.shape[1] + 1) and torch.equal(new[:, :-1], old)


@contextmanager
def edit_tokens(model: Any, point: int | str, edit: EditTokens) -> Iterator[None]:
    """While active, the activations h [B, T, D] at a hook point become `edit(h, tokens)` in every pass.

    The prompt is what the model reads with an empty cache; the passes that follow it, of any length, read what was
    generated. UserError for a point that does not exist (see capture).
    """
    hooked = module_at(model, point)
    passes = _Passes()

    def after(module: Any, inputs: Any, output: Any) -> Any:
        h = output_of(output)
        edited = edit(h, passes.tokens(h))
        if edited is h:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handles = [
        model.register_forward_pre_hook(passes.before, with_kwargs=True),
        hooked.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_layer(hook_point: str) -> int:
    """Layer L of a hook point `blocks.L.hook_resid_post`. Raises UserError for any other place."""
    layer, part = block_part(hook_point) or (0, "")
    if part != "resid_post":
        raise UserError(
            f"the activations were taken at {hook_point!r}; only the residual stream after a block "
            "(blocks.L.hook_resid_post) can be edited"
        )
    return layer
