"""Slots of a dictionary: the concept slots of an aligned one, or the best slots of one that knows no concepts.

Shapes: B rows, D width, R concepts, S slots, n slots of one bank.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Literal

import torch
from torch import Tensor

from trainer.analysis.rivals.learning import Learning, Lesson, learn
from trainer.analysis.rivals.method import Method
from trainer.analysis.rivals.rows import TrainingRows
from trainer.analysis.steering import SlotEdit
from trainer.dictionary import ConceptDictionary
from trainer.language_model import Edit, EditableModel

WriteBack = Literal["add", "replace"]
ROWS = 4096  # encoded at once


class Slots(Method):
    """One slot for each concept: a swap sets that of the source to 0 and that of the target to strength times its mean
    activation on rows that have the concept; suppression sets it to 0.

    Args:
        dictionary: whose slots.
        slots: numbers of the R slots, in the order of the concepts.
        means: mean activation [R] of each on rows that have its concept.
        write_back: add: h + decode(z') - decode(z), which keeps what the dictionary does not reconstruct. replace:
            decode(z').
        relative: whether an activation is read in units of its mean. Concept slots learn to be comparable; slots that
            were chosen afterwards do not.
    """

    def __init__(
        self,
        dictionary: ConceptDictionary,
        slots: Sequence[int],
        means: Tensor,
        write_back: WriteBack = "add",
        *,
        relative: bool = False,
    ):
        self._dictionary, self._write_back = dictionary, write_back
        none = torch.full((1, len(slots)), torch.nan)
        self._edit = SlotEdit(dictionary, slots, "set", none, dictionary.mean.device)
        self.means, self.rows = means, self._edit.rows
        self._unit = means.clamp_min(1e-12) if relative else torch.ones_like(means)

    def writing(self, rows: Tensor) -> "Slots":
        """The same slots with other rows [R, D] that they write."""
        other = copy(self)
        other.rows = rows
        return other

    def scores(self, h: Tensor) -> Tensor:
        """See Method."""
        return self._edit.read(h) / self._unit

    def swap(self, source: Tensor, target: Tensor, strength: float) -> Edit:
        """See Method."""
        row, value = torch.arange(len(source)), strength * self.means[target]

        def change(z: Tensor) -> None:
            z[row, source] = 0.0
            z[row, target] = value

        return lambda h: self._changed(h, change)

    def suppress(self, concept: Tensor) -> Edit:
        """See Method."""
        row = torch.arange(len(concept))

        def change(z: Tensor) -> None:
            z[row, concept] = 0.0

        return lambda h: self._changed(h, change)

    def _changed(self, h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
        z = self._edit.read(h)
        changed = z.clone()
        change(changed)
        edited = h.float() + (changed - z) @ self.rows
        if self._write_back == "replace":
            edited = edited - h.float() + self._dictionary.decode(self._dictionary.encode(h))
        return edited.to(h.dtype)


def slot_means(dictionary: ConceptDictionary, rows: TrainingRows, slots: Sequence[int]) -> Tensor:
    """Mean activation [R] fp32 of slots[r] over the rows that have concept r."""
    weights = dictionary.rows(slots)
    total = torch.zeros(len(slots), dtype=torch.float64, device=rows.acts.device)
    for acts, member in zip(rows.acts.split(ROWS), rows.member.split(ROWS), strict=True):
        total += (weights.encode(dictionary.normalise(acts)).double() * member).sum(dim=0)
    return (total / rows.member.sum(dim=0)).float()


def best_slots(dictionary: ConceptDictionary, rows: TrainingRows) -> list[int]:
    """For each concept the slot whose activation correlates most with whether a row has it (R numbers)."""
    count, positives = len(rows.acts), rows.member.double().sum(dim=0)
    found = []
    for bank in dictionary.all_banks():
        together = torch.zeros(len(positives), bank.slots, dtype=torch.float64, device=rows.acts.device)
        total, square = (torch.zeros_like(together[0]) for _ in range(2))
        for acts, member in zip(rows.acts.split(ROWS), rows.member.split(ROWS), strict=True):
            z = bank.encode(dictionary.normalise(acts)).double()
            together += member.double().T @ z
            total += z.sum(dim=0)
            square += z.square().sum(dim=0)
        spread = (square / count - (total / count).square()).clamp_min(0).sqrt()
        covariance = together / count - torch.outer(positives, total) / count**2
        # What the concept itself spreads is the same factor for all slots.
        found.append(torch.where(spread > 0, covariance / spread, 0.0))
    return torch.cat(found, dim=1).argmax(dim=1).tolist()


def learn_rows(editable: EditableModel, lesson: Lesson, slots: Slots, learning: Learning) -> Tensor:
    """Decoder rows [R, D] with which swaps of the slots do what the lesson asks (learning.learn).

    They begin with those that the slots have, and are learned in units of the typical entry of what a slot at its mean
    writes. What a slot reads stays.
    """
    written = slots.rows * slots.means[:, None]
    unit = written.square().mean().sqrt() / slots.means.clamp_min(1e-12)[:, None]
    change = torch.zeros_like(slots.rows, requires_grad=True)
    learn(editable, lesson, [change], lambda: slots.writing(slots.rows + change * unit), learning)
    return (slots.rows + change * unit).detach()
