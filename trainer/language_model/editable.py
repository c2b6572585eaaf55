"""Prompts that are read once and edited often, at their last token.

What such an edit changes is computed at that token and behind it; the tokens before it, most of a prompt, are the same
for every method, strength and step of learning. So they are read once, and what attention keeps of them is copied.

B prompts, T tokens of the longest, D width at the hook point, A tokens of the longest answer, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from trainer.language_model.capture import accepted, check_layers, positions
from trainer.language_model.editing import Edit, Tokens, edit_tokens
from trainer.language_model.prompts import batched, encode_answer, encode_prompts, greedy_answers

KEPT = 2 * 2**30  # bytes of prompts that were read

T = TypeVar("T")


class EditableModel:
    """A frozen language model, and the block behind which activations are edited.

    Args:
        model, tokenizer: see load_language_model.
        layer: index of the block. UserError for one that does not exist.
        batch_size: prompts that are read together.
        kept: bytes of prompts that are kept; those that do not fit are read anew each time.
    """

    def __init__(self, model: Any, tokenizer: Any, layer: int, batch_size: int = 256, kept: int = KEPT):
        check_layers(model, [layer])
        self.model, self.tokenizer, self.layer, self.batch_size = model, tokenizer, layer, batch_size
        self._room, self._read = kept, dict[tuple[str, ...], ReadPrompts]()

    def read(self, prompts: Sequence[str], among: Sequence[str] = ()) -> "ReadPrompts":
        """One batch of prompts, each as often as it is named. What is kept is each once, for the next batch of the same
        prompts, or, where `among` is given, of any of these."""
        key = tuple(dict.fromkeys(among or prompts))
        row = {prompt: i for i, prompt in enumerate(key)}
        found = self._read.get(key) or ReadPrompts.read(self.model, self.tokenizer, self.layer, key)
        if key not in self._read and found.bytes <= self._room:
            self._room -= found.bytes
            self._read[key] = found
        return found.of([row[prompt] for prompt in prompts])

    def batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """Runs of batch_size items, the last one shorter."""
        return batched(items, self.batch_size)

    def ends(self, prompts: Sequence[str]) -> Tensor:
        """Activations [n, D] at the last tokens of n prompts: what an edit is given."""
        return torch.cat([self.read(part).ends() for part in self.batches(prompts)])

    def answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to n prompts without an edit, as generate_answers gives them."""
        return [text for part in self.batches(prompts) for text in self.read(part).answers(None, max_new_tokens)]


class ReadPrompts:
    """B prompts, read up to their last tokens, which are in one column: shorter prompts are padded on the left.

    A model that keeps anything but keys and values (a recurrent state) reads the whole prompts for every edit.
    """

    def __init__(
        self, model: Any, tokenizer: Any, layer: int, ids: Tensor, mask: Tensor, cache: Any, rows: Tensor | None = None
    ):
        """ids, mask [B, T]; cache: of the tokens before the last, or None; rows: its rows that these prompts have."""
        self._model, self._tokenizer, self._layer = model, tokenizer, layer
        self._ids, self._mask, self._cache, self._rows = ids, mask, cache, rows

    @classmethod
    def read(cls, model: Any, tokenizer: Any, layer: int, prompts: Sequence[str]) -> "ReadPrompts":
        """Read the prompts up to their last tokens."""
        ids, mask = (t.to(model.device) for t in encode_prompts(tokenizer, prompts, side="left"))
        return cls(model, tokenizer, layer, ids, mask, _before(model, ids[:, :-1], mask[:, :-1]))

    def of(self, rows: Sequence[int]) -> "ReadPrompts":
        """The prompts of these rows, which may be there more than once."""
        if list(rows) == [*range(len(self._ids))]:
            return self
        chosen = torch.tensor(rows)  # on the host: layers of the cache may be on several devices
        ids, mask = self._ids[chosen], self._mask[chosen]
        return ReadPrompts(self._model, self._tokenizer, self._layer, ids, mask, self._cache, chosen)

    @property
    def bytes(self) -> int:
        """What is kept of all that were read."""
        layers = [] if self._cache is None else self._cache.layers
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in layers)

    def _kept(self) -> dict[str, Any]:
        if self._cache is None:
            return {}
        kept = copy.deepcopy(self._cache)
        if self._rows is not None:
            kept.batch_select_indices(self._rows)
        return {"past_key_values": kept}

    def _editing(self, edit: Edit | None) -> Any:
        """Context in which the activations [B, D] at the last prompt tokens become `edit` of them."""
        column = self._ids.shape[1] - 1

        def at_column(h: Tensor, tokens: Tokens) -> Tensor:
            here = column - tokens.start
            if edit is None or not 0 <= here < h.shape[1]:
                return h
            edited = h.clone()
            edited[:, here] = edit(h[:, here]).to(h.dtype)
            return edited

        return edit_tokens(self._model, self._layer, at_column)

    def answers(self, edit: Edit | None, max_new_tokens: int) -> list[str]:
        """Greedy answers under an edit: the first line of what follows each prompt, stripped."""
        with self._editing(edit):
            return greedy_answers(self._model, self._tokenizer, self._ids, self._mask, max_new_tokens, **self._kept())

    def logits(self, edit: Edit | None, answers: Tensor | None = None) -> Tensor:
        """Logits [B, 1 + A, V] at the last prompt token and at the tokens of `answers` [B, A] behind it (A = 0 without
        any). Differentiable in what the edit computes."""
        ids, mask = self._ids, self._mask
        if answers is not None:
            ids, mask = torch.cat([ids, answers], dim=1), torch.cat([mask, torch.ones_like(answers)], dim=1)
        new = ids.shape[1] - self._ids.shape[1] + 1
        first = 0 if self._cache is None else ids.shape[1] - new
        places = {name: place[:, first:] for name, place in positions(self._model, mask).items()}
        with self._editing(edit):
            out = self._model(
                input_ids=ids[:, first:],
                attention_mask=mask,
                use_cache=self._cache is not None,
                **places,
                **accepted(self._model, logits_to_keep=new),
                **self._kept(),
            )
        return out.logits[:, -new:]

    @torch.no_grad()
    def ends(self) -> Tensor:
        """Activations [B, D] at the last prompt tokens."""
        found: list[Tensor] = []

        def look(h: Tensor) -> Tensor:
            found.append(h.clone())
            return h

        self.logits(look)
        return found[0]

    def cross_entropy(self, answers: Sequence[str], edit: Edit | None) -> tuple[Tensor, int]:
        """Sum of the cross-entropy (nats, fp32) of the answers behind their prompts under an edit, and the number of
        their tokens. Differentiable in what the edit computes."""
        told = [torch.tensor(encode_answer(self._tokenizer, answer), device=self._ids.device) for answer in answers]
        ids = pad_sequence(told, batch_first=True)
        wanted = pad_sequence(told, batch_first=True, padding_value=-100)
        logits = self.logits(edit, ids[:, :-1])
        total = cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
        return total, sum(map(len, told))


@torch.no_grad()
def _before(model: Any, ids: Tensor, mask: Tensor) -> Any:
    """What attention keeps of the tokens [B, T - 1] before the last; None where there are none, or more is kept."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if not ids.shape[1]:
        return None
    options = accepted(model, logits_to_keep=1) | positions(model, mask)
    cache = getattr(model(input_ids=ids, attention_mask=mask, use_cache=True, **options), "past_key_values", None)
    if type(cache) is not DynamicCache:
        return None
    known = all(type(one) in (DynamicLayer, DynamicSlidingWindowLayer) for one in cache.layers)
    return cache if known else None
