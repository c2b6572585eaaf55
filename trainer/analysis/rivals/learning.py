"""Learning what a swap writes from the answers that a frozen model gives under it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.analysis.interventions import Swap, answer_cross_entropy
from trainer.analysis.rivals.method import Method


@dataclass(frozen=True)
class Learning:
    """AdamW for `steps` batches of `batch` swaps, at a rate that falls linearly to 0. progress is told of steps."""

    steps: int = 200
    batch: int = 64
    rate: float = 0.01
    seed: int = 0
    progress: Callable[[int], Any] = lambda n: None


def learn(
    model: Any,
    tokenizer: Any,
    layer: int,
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
    generator = torch.Generator().manual_seed(how.seed)
    optimizer = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, how.steps)
    for _ in range(how.steps):
        chosen = [swaps[i] for i in torch.randint(len(swaps), (how.batch,), generator=generator).tolist()]
        source, target = torch.tensor([[s.source, s.target] for s in chosen]).unbind(dim=1)
        prompts, answers = [s.prompt for s in chosen], [s.target_answer for s in chosen]
        edit = method().swap(source, target, 1.0)
        total, tokens = answer_cross_entropy(model, tokenizer, prompts, answers, layer, edit)
        optimizer.zero_grad()
        (total / tokens).backward()
        optimizer.step()
        decay.step()
        how.progress(1)
