"""What every way to act on concepts can do.

Shapes: B rows, D width at the hook point, R concepts. Activations h [B, D] are raw, of any float dtype.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from trainer.language_model import Edit


class Method(ABC):
    """Reads concepts in activations, swaps one for another, suppresses one.

    knows_none: whether scores say that a row has none of the concepts, by being 0 or less.
    """

    knows_none = True

    @abstractmethod
    def scores(self, h: Tensor) -> Tensor:
        """How much each concept is there, [B, R] fp32: comparable between the concepts of a row, and between rows."""

    @abstractmethod
    def swap(self, source: Tensor, target: Tensor, strength: float) -> Edit:
        """Edit of h [B, D] that puts concept target[i] in the place of source[i] in row i; int64 [B] each.

        A strength of 1 is as much of the target as rows that have it have on average.
        """

    @abstractmethod
    def suppress(self, concept: Tensor) -> Edit:
        """Edit of h [B, D] that takes concept[i], int64 [B], out of row i."""

    def reads(self, h: Tensor) -> Tensor:
        """The concept [B] int64 that is there most; -1 where the method knows that none is."""
        best, concept = self.scores(h).max(dim=1)
        return torch.where(best > 0, concept, -1) if self.knows_none else concept


def when_read(method: Method, concept: Tensor, edit: Edit) -> Edit:
    """The edit where the method reads concept[i] in row i; other rows stay as they are."""

    def conditional(h: Tensor) -> Tensor:
        return torch.where((method.reads(h) == concept)[:, None], edit(h), h)

    return conditional


def nearness(h: Tensor, means: Tensor, centre: Tensor) -> Tensor:
    """How much nearer h [B, k] is to each of means [R, k] than to centre [k]: half the difference of squared distances,
    [B, R]. Linear in h, along the difference of the two means."""
    return h @ (means - centre).T - (means.square().sum(dim=1) - centre.square().sum()) / 2


def moved_along(h: Tensor, direction: Tensor, to: Tensor) -> Tensor:
    """h [B, D] fp32 with its component along direction [B, D] (of any norm but 0) made that of `to` [B, D]."""
    unit = direction / direction.norm(dim=1, keepdim=True)
    return h + unit * (unit * (to - h)).sum(dim=1, keepdim=True)
