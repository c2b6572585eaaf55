"""Token batches of questions and texts; the batch of a step is a pure function of (examples, sizes, seed, step)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.language_model import Prompt, encode_answer

# Batches are cut from runs of this many batches sorted by length: little padding, still random company.
SORTED_RUN = 8


@dataclass(frozen=True)
class Example:
    """Token ids and how many of them, at the end, are predicted (the loss covers those only)."""

    ids: list[int]
    predicted: int


@dataclass(frozen=True)
class Batch:
    """Right-padded ids [B, T] and a mask [B, T - 1] of the columns whose successor is predicted."""

    ids: Tensor
    predict: Tensor

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.predict.to(device))

    def targets(self) -> Tensor:
        """The predicted token ids [N], row by row."""
        return self.ids[:, 1:][self.predict]


def encode_question(tokenizer: Any, prompt: Prompt) -> Example:
    """Prompt, space, answer, end token; answer and end token are predicted."""
    answer = encode_answer(tokenizer, prompt.answer)
    return Example(tokenizer(prompt.prompt)["input_ids"] + answer, len(answer))


def encode_text(tokenizer: Any, text: str, context: int) -> list[Example]:
    """A text and an end token, cut into windows of at most `context` tokens; all but the first token are predicted."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer(text)["input_ids"] + end
    windows = [ids[start : start + context] for start in range(0, len(ids), context)]
    return [Example(window, len(window) - 1) for window in windows if len(window) > 1]


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Right padding: under a causal mask no real token sees it, so no attention mask is needed."""
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), pad)
    predict = torch.zeros(len(examples), width - 1, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        predict[row, length - 1 - example.predicted : length - 1] = True
    return Batch(ids, predict)


class Shuffled:
    """Endless batches of `size` examples: every epoch a new permutation, cut into batches of similar length."""

    def __init__(self, examples: Sequence[Example], size: int, pad: int, seed: int) -> None:
        self.examples, self.pad, self.seed = examples, pad, seed
        self.size = min(size, len(examples))
        self._lengths = np.array([len(e.ids) for e in examples])
        self._epoch = -1
        self._order: list[np.ndarray] = []

    @property
    def digest(self) -> str:
        """sha256 (hex) of all token ids: a checkpoint of other data must not be continued."""
        sha = hashlib.sha256()
        for example in self.examples:
            sha.update(np.array([*example.ids, -example.predicted], dtype=np.int64).tobytes())
        return sha.hexdigest()

    def _plan(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.examples))
        run = self.size * SORTED_RUN
        order = np.concatenate(
            [
                part[np.argsort(self._lengths[part], kind="stable")]
                for part in np.split(order, range(run, len(order), run))
            ]
        )
        whole = len(order) // self.size
        batches = np.split(order[: whole * self.size], whole)
        return [batches[i] for i in rng.permutation(whole)]

    def __getitem__(self, step: int) -> Batch:
        epoch, index = divmod(step, len(self.examples) // self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._plan(epoch)
        return collate([self.examples[i] for i in self._order[index]], self.pad)
