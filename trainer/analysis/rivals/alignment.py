"""Distributed alignment search (DAS): the subspace that carries the concept, learned through the frozen model.

Shapes: B rows, D width, R concepts, k dimensions of the subspace, T tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from trainer.analysis.rivals.learning import Learning, Lesson, learn
from trainer.analysis.rivals.method import Method, nearness
from trainer.analysis.rivals.rows import TrainingRows
from trainer.language_model import Edit, EditableModel


class Alignment(Method):
    """An orthonormal basis [D, k]: what h has in its span is replaced, the rest stays.

    A swap makes the component that of centre + strength (mean of target - centre), with class means and the centre of
    TrainingRows; suppression makes it that of the mean row without the concept. What is read is the class mean that is
    nearest in the subspace.

    Geiger et al., "Finding Alignments Between Interpretable Causal Variables and Distributed Neural Representations"
    (arXiv 2303.02536), interchange with the component of another prompt's activation, whose value of the variable is
    wanted, and learn for the answer that follows from it. Here the other side is a class mean: the variable is which
    concept is there, the same for all prompts of a concept, and every method of this room gets the same rows and no
    second prompt at the time of the swap.
    """

    def __init__(self, rows: TrainingRows, basis: Tensor):
        self._basis, self.knows_none = basis, bool(rows.without.any())
        self._means, self._others, self._centre = rows.means @ basis, rows.others @ basis, rows.centre @ basis

    def scores(self, h: Tensor) -> Tensor:
        """See Method."""
        return nearness(h.float() @ self._basis, self._means, self._centre)

    def swap(self, source: Tensor, target: Tensor, strength: float) -> Edit:
        """See Method."""
        return self._set(self._centre + strength * (self._means[target] - self._centre))

    def suppress(self, concept: Tensor) -> Edit:
        """See Method."""
        return self._set(self._others[concept])

    def _set(self, component: Tensor) -> Edit:
        return lambda h: (h.float() + (component - h.float() @ self._basis) @ self._basis.T).to(h.dtype)


def learn_basis(
    editable: EditableModel,
    lesson: Lesson,
    rows: TrainingRows,
    dimensions: int,
    learning: Learning,
) -> Tensor:
    """The basis [D, k] fp32 whose swaps do what the lesson asks (learning.learn).

    It begins with the k directions in which class means differ most, and random ones beyond those.
    """
    turn = nn.Linear(rows.acts.shape[1], dimensions, bias=False)
    apart = (rows.means - rows.means.mean(dim=0)).cpu()
    random = torch.randn(turn.weight.shape, generator=torch.Generator().manual_seed(learning.seed))
    begin = torch.cat([torch.linalg.svd(apart, full_matrices=False).Vh[: len(apart) - 1], random])
    turn.weight = nn.Parameter(torch.linalg.qr(begin[:dimensions].T).Q.T)
    orthogonal(turn).to(rows.acts.device)
    learn(editable, lesson, [*turn.parameters()], lambda: Alignment(rows, turn.weight.T), learning)
    return turn.weight.detach().T.contiguous()
