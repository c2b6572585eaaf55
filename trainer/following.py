"""What follows the batches that were trained on: the weight of sparsity, how much slots depend on concepts, which died.

Shapes: G rows of the global batch, R concepts, n slots of a bank.
"""

import torch
from torch import Tensor

LEAST_SPARSITY, MOST_SPARSITY = 1e-4, 1e4
SPARSITY_RATE = 0.03


def followed_sparsity(factor: Tensor, l0: Tensor, target: float | Tensor) -> Tensor:
    """What the weight of sparsity is multiplied with after one more step, at which a row of the global batch had `l0`
    active free slots on average, where `target` are wanted; scalars, fp64.

    As a threshold is (gate.BatchTopK), but by less a step: weights answer to it over tens of steps.
    """
    change = (l0 / target - 1.0).clamp(-1.0, 1.0)
    return (factor * (SPARSITY_RATE * change).exp()).clamp(LEAST_SPARSITY, MOST_SPARSITY)


def dead_slots(last_fired: Tensor, step: int, after: int) -> Tensor:
    """Which slots [n] count as dead after `step` steps: those that were last active `after` steps ago, or earlier."""
    return last_fired <= step - after


# A slot that is independent of the concepts has a dependence of 1, whatever its frequency; it wanders by some
# hundredths, and by more where concept slots themselves move. The term leaves a slot alone up to INDEPENDENT and counts
# it whole from DEPENDENT on.
INDEPENDENT, DEPENDENT = 3.0, 6.0
DEPENDENCE_RATE = 0.01


def followed_dependence(
    dependence: Tensor, squares: Tensor, rows: Tensor, concepts: Tensor, made: Tensor | None = None
) -> Tensor:
    """Dependence [n] of free slots on the concepts after one more step.

    A sum of R squared sample correlations is R / (G - 1) on average where a slot is independent, however often it is
    active (and exactly so for any two columns under permutation of their rows); dependence is that sum over its
    expectation, averaged over the steps in which the slot was active on some row.

    Args:
        dependence: [n], 1 at first.
        squares: [n], of each slot the sum of its squared correlations with the concept slots; 0 for a constant one.
        rows: G, a scalar. concepts: concept slots that are not constant, a scalar.
        made: whether the step was, a scalar bool; None: it was.
    """
    ratio = squares * ((rows - 1) / concepts.clamp_min(1))
    counts = squares > 0 if made is None else (squares > 0) & made
    return torch.where(counts, dependence + DEPENDENCE_RATE * (ratio - dependence), dependence)


def perp_weight(dependence: Tensor) -> Tensor:
    """How much slots of this dependence [n] count in the orthogonality term, from 0 to 1."""
    return ((dependence - INDEPENDENT) / (DEPENDENT - INDEPENDENT)).clamp(0.0, 1.0)
