"""Learning what a swap writes from the answers that a frozen model gives under it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from trainer.analysis.interventions import Swap, edit_of
from trainer.analysis.rivals.method import Method
from trainer.language_model import EditableModel


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
    order = torch.randperm(len(swaps), generator=torch.Generator().manual_seed(how.seed))
    # The same batches in every round, so that their prompts are read once.
    batches = [[swaps[i] for i in part] for part in order.split(how.batch)]
    optimizer = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, how.steps)
    for batch in islice(cycle(batches), how.steps):
        edit = edit_of(batch, lambda source, target: method().swap(source, target, 1.0))
        total, tokens = editable.read([s.prompt for s in batch]).cross_entropy([s.target_answer for s in batch], edit)
        optimizer.zero_grad()
        (total / tokens).backward()
        optimizer.step()
        decay.step()
        how.progress(1)
