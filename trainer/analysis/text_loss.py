"""What the reconstruction costs a language model on text, at all its tokens.

Shapes: B windows of a batch, T tokens, D model width.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from trainer.analysis.interventions import ablations, shares_recovered
from trainer.dictionary import ConceptDictionary
from trainer.errors import UserError
from trainer.language_model import Edit, Tokens, edit_tokens

BATCH_TOKENS = 2048  # of a forward pass, which gives logits over the vocabulary for each


def text_windows(tokenizer: Any, texts: Iterable[str], context: int, most: int) -> tuple[list[list[int]], int]:
    """Token ids in windows of at most `context`, `most` tokens in all, and how many texts they are of. Windows of one
    token, which predict nothing, are left out. Raises UserError when nothing is left."""
    windows: list[list[int]] = []
    left, read = most, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"][:left]
        parts = [ids[first : first + context] for first in range(0, len(ids), context)]
        parts = [part for part in parts if len(part) > 1]
        windows += parts
        read += bool(parts)
        left -= len(ids)
        if left <= 0:
            break
    if not windows:
        raise UserError("no text has two tokens, so that no token is predicted: there is no loss to recover")
    return windows, read


@torch.no_grad()
def text_loss_recovered(
    model: Any,
    windows: Sequence[Sequence[int]],
    layer: int,
    dictionary: ConceptDictionary,
    most_norm: float | None = None,
    progress: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:
    """Cross-entropy (nats per token) of every token but the first of each window, where every activation after block
    `layer` is left alone, or replaced by its reconstruction, the mean activation or 0; and the shares recovered, as
    interventions.loss_recovered has them for answers.

    most_norm: activations of a larger norm, on which the dictionary was not trained, stay as they are throughout;
    `left_alone` counts them. progress is told the tokens of each batch and ablation.
    """
    loss: dict[str, float] = {}
    left_alone = tokens = 0
    for name, edit in ablations(dictionary).items():
        total, tokens, left_alone = 0.0, 0, 0

        def everywhere(h: Tensor, seen: Tokens, edit: Edit | None = edit) -> Tensor:
            nonlocal left_alone
            assert edit is not None and seen.real is not None
            flat = h.flatten(0, 1)
            edited = edit(flat)
            if most_norm is not None:
                giant = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32) > most_norm
                left_alone += int((giant & seen.real.flatten()).sum())
                edited = torch.where(giant[:, None], flat, edited)
            return edited.view_as(h)

        for batch in _batches(windows):
            ids = pad_sequence([torch.tensor(window) for window in batch], batch_first=True).to(model.device)
            lengths = torch.tensor([len(window) for window in batch], device=model.device)
            real = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
            with edit_tokens(model, layer, everywhere) if edit is not None else nullcontext():
                logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
            target = torch.where(real, ids, -100)[:, 1:]
            total += float(cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten(), reduction="sum"))
            tokens += int((target >= 0).sum())
            progress(int(real.sum()))
        loss[name] = total / tokens
    return {"tokens": tokens, "left_alone": left_alone, **shares_recovered(loss)}


def _batches(windows: Sequence[Sequence[int]]) -> Iterable[list[Sequence[int]]]:
    """Windows in order, about BATCH_TOKENS together."""
    batch: list[Sequence[int]] = []
    for window in windows:
        if batch and (len(batch) + 1) * max(map(len, [*batch, window])) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    yield batch
