"""Logistic regression on activations, and steering along its weights.

Shapes: N or B rows, D width, R concepts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.analysis.rivals.method import Method, moved_along
from trainer.analysis.rivals.rows import TrainingRows
from trainer.language_model import Edit

L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # tried in this order, in units of normalised rows
VALIDATION = 5  # every fifth of the shuffled rows chooses the weight of L2
ITERATIONS = 100  # of a fit
ROUGH = 40  # of one in fp32 that only chooses the weight of L2
LARGE = 1e9  # products of one pass over the rows, from which on it is made in fp32
FLAT = {torch.float64: 1e-11, torch.float32: 1e-5}  # the least change of the loss that another iteration is worth


def fit(
    x: Tensor,
    member: Tensor,
    l2: float,
    *,
    several: bool,
    begin: tuple[Tensor, Tensor] | None = None,
    iterations: int = ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """Weights [R, D] and biases [R] that minimise cross-entropy + l2 / 2 ||W||^2, by LBFGS from `begin` (None: 0).

    x [N, D], member [N, R] bool. Cross-entropy is the mean over rows: multinomial over the one concept that a row has,
    or with `several` the sum over concepts of the binary one, in which rows may have any number of concepts.
    """
    zero = x.new_zeros(member.shape[1], x.shape[1]), x.new_zeros(member.shape[1])
    weights, biases = (value.clone().requires_grad_() for value in begin or zero)
    truth = member.to(x.dtype) if several else member.to(torch.uint8).argmax(dim=1)
    solver = torch.optim.LBFGS(
        [weights, biases],
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=FLAT[x.dtype],
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        total = cross_entropy(x @ weights.T + biases, truth) + l2 / 2 * weights.square().sum()
        total.backward()
        return total

    solver.step(loss)
    return weights.detach(), biases.detach()


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean over rows; truth is the concept [N] int64, or whether each is there [N, R] in the dtype of logits."""
    if truth.ndim == 1:
        return F.cross_entropy(logits, truth)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / len(logits)


def fit_probe(rows: TrainingRows, seed: int = 0) -> "Probe":
    """The probe with the weight of L2 that does best on a fifth of the rows, fitted again on all of them.

    Multinomial where every row has exactly one concept, else one against the rest. Rows are centred and divided by one
    number, so that the mean square of an entry is 1.
    """
    mean = rows.mean.double()
    x = rows.acts.double() - mean
    scale = x.square().mean().sqrt()
    x = (x / scale).to(torch.float32 if x.numel() * rows.member.shape[1] > LARGE else torch.float64)
    several = rows.several or bool(rows.without.any())
    truth = rows.member.to(x.dtype) if several else rows.member.to(torch.uint8).argmax(dim=1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held, used = order[::VALIDATION], order[torch.arange(len(order), device=x.device) % VALIDATION > 0]
    best, chosen, found = float("inf"), L2[0], None
    iterations = ITERATIONS if x.dtype == torch.float64 else ROUGH
    for l2 in L2 if len(used) else ():
        found = fit(x[used], rows.member[used], l2, several=several, begin=found, iterations=iterations)
        loss = float(cross_entropy(x[held] @ found[0].T + found[1], truth[held]))
        if loss >= best:  # less of it only fits the rows closer
            break
        best, chosen = loss, l2
    weights, biases = fit(x, rows.member, chosen, several=several, begin=found)
    weights, biases = weights.double() / scale, biases.double()
    return Probe(rows, weights.float(), (biases - weights @ mean).float(), knows_none=several, l2=chosen)


class Probe(Method):
    """Logits h W^T + b [B, R].

    A swap goes along the difference d of the two weights, scaled so that a strength of 1 moves h along d as far as the
    two class means are apart there: h + strength d d^T (mean of target - mean of source) / d^T d. The probe's own
    verdict between the two then changes on average as it does between rows that have the one and the other.
    Suppression gives the component along the concept's weight (minus the mean weight, where one concept excludes the
    others) the value that it has in the mean row without the concept.

    weights [R, D] and biases [R] are on raw rows. l2: the weight that was chosen.
    """

    def __init__(self, rows: TrainingRows, weights: Tensor, biases: Tensor, *, knows_none: bool, l2: float):
        self.weights, self.biases, self.knows_none, self.l2 = weights, biases, knows_none, l2
        self._means, self._others = rows.means, rows.others

    def scores(self, h: Tensor) -> Tensor:
        """See Method."""
        return h.float() @ self.weights.T + self.biases

    def swap(self, source: Tensor, target: Tensor, strength: float) -> Edit:
        """See Method."""
        direction = self.weights[target] - self.weights[source]
        apart = moved_along(torch.zeros_like(direction), direction, self._means[target] - self._means[source])
        return lambda h: (h.float() + strength * apart).to(h.dtype)

    def suppress(self, concept: Tensor) -> Edit:
        """See Method."""
        common = 0.0 if self.knows_none else self.weights.mean(dim=0)
        direction, other = self.weights[concept] - common, self._others[concept]
        return lambda h: moved_along(h.float(), direction, other).to(h.dtype)
