"""Least-squares concept erasure (LEACE), and a swap in the subspace that it erases.

Shapes: B rows, D width, R concepts, k dimensions of the subspace.
"""

import torch
from torch import Tensor

from trainer.analysis.rivals.method import Method, nearness
from trainer.analysis.rivals.rows import TrainingRows
from trainer.language_model import Edit

TOLERANCE = 1e-6  # of the largest: singular values below it are 0


class Erasure(Method):
    """r(h) = h - W^-1 P W (h - mean), with W = cov(h)^-1/2 and P the orthogonal projection onto the columns of
    W cov(h, concepts): Belrose et al., "LEACE: Perfect linear concept erasure in closed form" (arXiv 2306.03819),
    theorem 4.3. Afterwards rows do not covary with the concepts, so that no linear classifier with a convex loss does
    better than a constant one. That holds for any invertible W; W as above makes it the smallest such change on
    average. The covariance is shrunk towards a multiple of the identity as far as it is uncertain (`shrunk`).

    A swap erases, and puts the target's class mean, as far as it lies in the same subspace, in the place of what was
    erased: r(h) + strength (h_target - r(h_target)) with h_target the mean. What is read is the class mean that is
    nearest in whitened coordinates of the subspace. Suppression erases the one concept against the rest, in one
    dimension.
    """

    def __init__(self, rows: TrainingRows):
        x = rows.acts.double()
        mean = x.mean(dim=0)
        member = rows.member.double()
        across = (x - mean).T @ (member - member.mean(dim=0)) / len(x)
        values, vectors = torch.linalg.eigh(shrunk(torch.cov(x.T, correction=0), len(x)))
        there = values > TOLERANCE**2 * values[-1]
        root, vectors = values[there].sqrt(), vectors[:, there]
        whiten, colour = vectors / root @ vectors.T, vectors * root @ vectors.T
        whitened = whiten @ across
        left, strength, _ = torch.linalg.svd(whitened, full_matrices=False)
        basis = left[:, strength > TOLERANCE * strength[0]]
        self.knows_none = bool(rows.without.any())
        self._mean = mean.float()
        # h - mean = write [D, k] (read^T [k, D] (h - mean)) + what is kept.
        self._read, self._write = (whiten @ basis).float(), (colour @ basis).float()
        self._means, self._centre = self._coordinates(rows.means), self._coordinates(rows.centre)
        one = whitened / whitened.norm(dim=0).clamp_min(1e-300)
        self._read_one, self._write_one = (whiten @ one).T.float(), (colour @ one).T.float()

    def _coordinates(self, h: Tensor) -> Tensor:
        return (h.float() - self._mean) @ self._read

    def scores(self, h: Tensor) -> Tensor:
        """See Method."""
        return nearness(self._coordinates(h), self._means, self._centre)

    def erase(self, h: Tensor) -> Tensor:
        """r(h) [B, D] fp32 of rows [B, D], all concepts at once."""
        return h.float() - self._coordinates(h) @ self._write.T

    def swap(self, source: Tensor, target: Tensor, strength: float) -> Edit:
        """See Method."""
        written = strength * self._means[target] @ self._write.T
        return lambda h: (self.erase(h) + written).to(h.dtype)

    def suppress(self, concept: Tensor) -> Edit:
        """See Method."""
        read, write = self._read_one[concept], self._write_one[concept]

        def edit(h: Tensor) -> Tensor:
            found = ((h.float() - self._mean) * read).sum(dim=1, keepdim=True)
            return (h.float() - found * write).to(h.dtype)

        return edit


def shrunk(covariance: Tensor, rows: int) -> Tensor:
    """Covariance [D, D] of that many rows, moved towards tr/D times the identity by the share that the
    oracle-approximating shrinkage estimator gives (OAS; Chen et al. 2010, arXiv 0907.4698)."""
    width = len(covariance)
    square, trace = covariance.square().sum(), covariance.trace()
    above = (1 - 2 / width) * square + trace**2
    below = (rows + 1 - 2 / width) * (square - trace**2 / width)
    share = torch.where(below > 0, above / below, 1.0).clamp(0.0, 1.0)
    return (1 - share) * covariance + share * trace / width * torch.eye(width).to(covariance)
