"""Learning what a swap writes from the answers that a frozen model gives under it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.analysis.interventions import Swap, edit_of
from trainer.analysis.rivals.method import Method
from trainer.language_model import EditableModel, batched

T = TypeVar("T")


@dataclass(frozen=True)
class Learning:
    """AdamW for `steps` batches of `batch` swaps, at a rate that falls linearly to 0. progress is told of steps."""

    steps: int = 200
    batch: int = 64
    rate: float = 0.01
    seed: int = 0
    progress: Callable[[int], Any] = lambda n: None


def learn(
    editable: EditableModel,
    swaps: Sequence[Swap],
    parameters: Sequence[Tensor],
    method: Callable[[], Method],
    how: Learning,
) -> None:
    """Change the parameters of a method until its swaps, at the last prompt token and strength 1, make the model give
    the target answers.

    It minimises their cross-entropy, by gradients through the blocks above the hook point; the model stays as it is.
    method: gives the method that the parameters are now.
    """
    batches = batches_of(swaps, how)
    optimizer = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, how.steps)
    for prompts, batch in islice(cycle(batches), how.steps):
        total, tokens = _cross_entropy(editable, batch, method(), prompts)
        optimizer.zero_grad()
        (total / tokens).backward()
        optimizer.step()
        decay.step()
        how.progress(1)


@torch.no_grad()
def swap_loss(editable: EditableModel, swaps: Sequence[Swap], method: Method) -> float:
    """Mean cross-entropy (nats per token) of the target answers of swaps at strength 1: what `learn` minimises."""
    total, tokens = 0.0, 0
    for part in editable.batches(swaps):
        found, count = _cross_entropy(editable, part, method)
        total, tokens = total + float(found), tokens + count
    return total / tokens


def _cross_entropy(
    editable: EditableModel, swaps: Sequence[Swap], method: Method, among: Sequence[str] = ()
) -> tuple[Tensor, int]:
    """Sum over the tokens of the target answers of one batch at strength 1, and their number. among: see read."""
    edit = edit_of(swaps, lambda source, target: method.swap(source, target, 1.0))
    return editable.read([s.prompt for s in swaps], among).cross_entropy([s.target_answer for s in swaps], edit)


def batches_of(swaps: Sequence[Swap], how: Learning) -> list[tuple[Sequence[str], Sequence[Swap]]]:
    """Batches of swaps in random order, each with the prompts that it draws from: as many as a batch has swaps.

    Every swap is in one batch. A prompt has a swap for each target, so prompts that are read once serve many batches.
    """
    generator = torch.Generator().manual_seed(how.seed)

    def shuffled(items: Sequence[T]) -> list[T]:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    of: dict[str, list[Swap]] = {}
    for swap in shuffled(swaps):
        of.setdefault(swap.prompt, []).append(swap)
    batches = []
    for group in batched([*of], how.batch):
        own = shuffled([swap for prompt in group for swap in of[prompt]])
        batches += [(group, part) for part in batched(own, how.batch)]
    return shuffled(batches)
