"""Differences of class means: the yardstick that learns nothing."""

from torch import Tensor

from trainer.analysis.rivals.method import Method, moved_along, nearness
from trainer.analysis.rivals.rows import TrainingRows
from trainer.language_model import Edit


class MeanDifference(Method):
    """Means [R, D] of the rows that have a concept.

    Reads by the nearest mean, swaps by h + strength (mean of target - mean of source), suppresses by giving the
    component along (mean with - mean without) the value of the mean without.
    """

    def __init__(self, rows: TrainingRows):
        self._means, self._others, self._centre = rows.means, rows.others, rows.centre
        self.knows_none = bool(rows.without.any())

    def scores(self, h: Tensor) -> Tensor:
        """See Method."""
        return nearness(h.float(), self._means, self._centre)

    def swap(self, source: Tensor, target: Tensor, strength: float) -> Edit:
        """See Method."""
        difference = strength * (self._means[target] - self._means[source])
        return lambda h: (h.float() + difference).to(h.dtype)

    def suppress(self, concept: Tensor) -> Edit:
        """See Method."""
        mean, other = self._means[concept], self._others[concept]
        return lambda h: moved_along(h.float(), mean - other, other).to(h.dtype)
