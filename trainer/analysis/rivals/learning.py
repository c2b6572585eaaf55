"""Learning what a swap writes from what a frozen model says under it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.analysis.interventions import EditFor, Swap, edit_of
from trainer.analysis.movement import prompts_moved, text_moved
from trainer.analysis.rivals.method import Method
from trainer.language_model import EditableModel, batched

TEXTS, OTHERS = 4, 16  # windows of text and other questions in a step

T = TypeVar("T")


@dataclass(frozen=True)
class Lesson:
    """What a method learns from.

    swaps: whose target answers the model should give. others, windows: prompts under swaps that ask for something else,
    and token ids [W, T] of ordinary text, all of it edited; the model should go on with them as without an edit. Where
    there are no windows, nothing but the answers counts.
    """

    swaps: Sequence[Swap]
    others: Sequence[Swap] = ()
    windows: Tensor | None = None


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
    lesson: Lesson,
    parameters: Sequence[Tensor],
    method: Callable[[], Method],
    how: Learning,
) -> None:
    """Change the parameters of a method until its swaps, at strength 1, make the model give the target answers and, if
    the lesson says so, leave the rest alone.

    It minimises lesson_loss, by gradients through the blocks above the hook point; the model stays as it is. method:
    gives the method that the parameters are now.
    """
    batches = cycle(batches_of(lesson.swaps, how))
    texts = cycle([] if lesson.windows is None else lesson.windows.split(TEXTS))
    others = cycle([] if lesson.windows is None else batches_of(lesson.others, replace(how, batch=OTHERS)))
    optimizer = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, how.steps)
    for prompts, batch in islice(batches, how.steps):
        edit_for = _at_one(method())
        total, tokens = _cross_entropy(editable, batch, edit_for, prompts)
        moved = [
            text_moved(editable, text, [*islice(cycle(batch), len(text))], edit_for).mean() for text in islice(texts, 1)
        ]
        moved += [prompts_moved(editable, part, edit_for, among).mean() for among, part in islice(others, 1)]
        optimizer.zero_grad()
        (worst_first([total / len(batch), *moved]) if moved else total / tokens).backward()
        optimizer.step()
        decay.step()
        how.progress(1)


@torch.no_grad()
def lesson_loss(editable: EditableModel, lesson: Lesson, method: Method) -> float:
    """Mean cross-entropy of the target answers at strength 1, nats per token; where the lesson has windows,
    worst_first of that per answer (a swap succeeds with the whole of it), of how far text moves and of how far other
    questions do (means of nats)."""
    edit_for = _at_one(method)
    found = [_cross_entropy(editable, part, edit_for) for part in editable.batches(lesson.swaps)]
    total = torch.stack([nats for nats, _ in found]).sum()
    if lesson.windows is None:
        return float(total) / sum(tokens for _, tokens in found)
    swaps, texts = cycle(lesson.swaps), lesson.windows.split(TEXTS)
    text = [text_moved(editable, ids, [*islice(swaps, len(ids))], edit_for) for ids in texts]
    moved = [torch.cat(text).mean()]
    if lesson.others:
        parts = [prompts_moved(editable, part, edit_for) for part in editable.batches(lesson.others)]
        moved.append(torch.cat(parts).mean())
    return float(worst_first([total / len(lesson.swaps), *moved]))


def worst_first(nats: Sequence[Tensor]) -> Tensor:
    """Minus the logarithm of the harmonic mean of exp(-nats): shares of probability joined as the joint score joins
    shares of success, so that the smallest counts most."""
    return torch.stack([*nats]).logsumexp(dim=0) - math.log(len(nats))


def _at_one(method: Method) -> EditFor:
    return lambda source, target: method.swap(source, target, 1.0)


def _cross_entropy(
    editable: EditableModel, swaps: Sequence[Swap], edit_for: EditFor, among: Sequence[str] = ()
) -> tuple[Tensor, int]:
    """Sum over the tokens of the target answers of one batch, and their number. among: see read."""
    read = editable.read([s.prompt for s in swaps], among)
    return read.cross_entropy([s.target_answer for s in swaps], edit_of(swaps, edit_for))


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
