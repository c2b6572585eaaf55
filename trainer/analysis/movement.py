"""How far an edit moves the distributions of next tokens, where it should move nothing.

Both are differentiable in what the edit computes, so that a method can learn to move little.

Shapes: B prompts, W windows of T tokens, V vocabulary, D width at the hook point.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from trainer.analysis.interventions import EditFor, Swap, edit_of
from trainer.language_model import EditableModel, Tokens, edit_tokens


def prompts_moved(
    editable: EditableModel, swaps: Sequence[Swap], edit_for: EditFor, among: Sequence[str] = ()
) -> Tensor:
    """Divergence (nats) [B] of the next token's distribution behind the prompts of one batch of swaps under their
    edits, at the last token. among: see EditableModel.read."""
    read = editable.read([s.prompt for s in swaps], among)
    with torch.no_grad():
        plain = read.logits(None)
    return divergence(plain[:, 0], read.logits(edit_of(swaps, edit_for))[:, 0])


def text_moved(editable: EditableModel, windows: Tensor, swaps: Sequence[Swap], edit_for: EditFor) -> Tensor:
    """Divergence (nats) [W, T] of the next token's distribution at every token of windows [W, T] of text, each edited
    at every token as its own of W swaps is."""
    with torch.no_grad():
        plain = editable.model(input_ids=windows, use_cache=False).logits
    with every_token(editable, swaps, edit_for):
        edited = editable.model(input_ids=windows, use_cache=False).logits
    return divergence(plain, edited)


def every_token(editable: EditableModel, swaps: Sequence[Swap], edit_for: EditFor) -> AbstractContextManager[None]:
    """Context in which row i of what the model reads is edited at every token as swaps[i] is."""

    def edit(h: Tensor, tokens: Tokens) -> Tensor:
        each = edit_of([swap for swap in swaps for _ in range(h.shape[1])], edit_for)
        return each(h.flatten(0, 1)).unflatten(0, h.shape[:2])

    return edit_tokens(editable.model, editable.layer, edit)


def divergence(plain: Tensor, edited: Tensor) -> Tensor:
    """KL divergence (nats) of softmax(edited) [..., V] from softmax(plain), fp32 [...]."""
    p, q = plain.float().log_softmax(dim=-1), edited.float().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)
