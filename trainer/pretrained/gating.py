"""A threshold and one gain for a relu dictionary that is trained: fitted on rows, without training.

L1 pays for sparsity twice: weak entries stay active, and all of them are shrunk. The threshold takes the weak ones
away, the gain undoes the shrinking. Shapes: N rows, D model width, n slots of a bank.
"""

from dataclasses import dataclass

from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.errors import UserError
from trainer.pretrained.calibration import Measured, gain, measure, threshold
from trainer.pretrained.source import Source

_LEAST_NORM = 1e-12


class Rescaled(Source):
    """A relu source in units in which its decoder rows have norm 1, and then times `gain`: one threshold for all slots
    asks of each how much it adds to the reconstruction.

    Raises UserError, when a bank is read, for a source whose gate is not relu.
    """

    def __init__(self, source: Source):
        self._source, self.gain = source, 1.0
        self.facts, self.width, self.slots = source.facts, source.width, source.slots

    def bank(self, begin: int, end: int) -> BankWeights:
        weights = self._source.bank(begin, end)
        if weights.threshold is not None:
            raise UserError(f"{self.facts.location} has thresholds already; give a dictionary whose gate is relu")
        norm = weights.W_dec.norm(dim=1, keepdim=True).clamp_min(_LEAST_NORM)
        return BankWeights(weights.W_enc * norm, weights.b_enc * norm[:, 0], weights.W_dec * (self.gain / norm))

    def output_bias(self) -> Tensor:
        return self._source.output_bias()


@dataclass(frozen=True)
class Gated:
    """What was fitted: the source in its new units with the gain in it, the threshold of all slots, and figures of the
    rows as the dictionary was and as it is."""

    source: Rescaled
    theta: float
    before: Measured
    after: Measured

    def measure(self, h: Tensor) -> Measured:
        """Figures of other raw rows [N, D]."""
        return measure(self.source, h, self.theta)


def fit_gate(source: Source, h: Tensor, k: int) -> Gated:
    """The threshold above which k entries a row lie on average over raw rows h [N, D], and then the gain with the least
    squared error.

    Raises UserError for a source that cannot be given a threshold: another gate than relu, named concept slots, or an
    L0 that is not above k.
    """
    if source.top_k is not None:
        raise UserError(f"{source.facts.location} keeps the {source.top_k} largest of each row; give a relu dictionary")
    if source.facts.concepts:
        raise UserError(
            f"{source.facts.location} has concept slots that are awake, which keep relu; give a run that ended with "
            f"stage pretrain, and align it afterwards (dictionary.start_from)"
        )
    rescaled = Rescaled(source)
    before = measure(rescaled, h)
    if before.l0 <= k:
        raise UserError(
            f"{source.facts.location} has {before.l0:.1f} active slots a row on these rows; give an --l0 below that"
        )
    theta = threshold(rescaled, h, k)[0]
    rescaled.gain = gain(rescaled, h, theta)
    return Gated(rescaled, theta, before, measure(rescaled, h, theta))
