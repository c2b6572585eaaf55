"""Every term of the objective on a whole code, in plain PyTorch: short, obvious, and the oracle that the fused objective is tested against.

Shapes: B rows, D width, R concepts, K free slots, A answers. Means run over the rows given; a row with label -1 counts for no label term.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import UserError

# A slot whose variance is below this share of its mean square is constant for fp32: its correlation is 0, not noise.
CONSTANT_SHARE = 1e-6


@dataclass
class LossConfig:
    """Weights of the five terms and their form; a stage may override each of them."""

    rec: float = 1.0
    sp: float = 0.05
    bind: float = 1.0
    perp: float = 0.01
    val: float = 0.1
    bind_on: str = "pre"  # logits of the binding term: pre (pre-activations) | code (the paper's letter)
    sp_warmup: int = 0  # steps over which the sparsity weight rises linearly from 0

    def validate(self) -> None:
        """Raise UserError for a negative weight or an unknown word."""
        for name in TERMS:
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name}={getattr(self, name)} must not be negative")
        if self.bind_on not in ("pre", "code"):
            raise UserError(f"loss.bind_on={self.bind_on!r} is unknown; use pre or code")

    def override(self, values: dict[str, float]) -> "LossConfig":
        """A copy with some fields replaced; unknown names raise UserError."""
        known = [f.name for f in fields(self)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise UserError(f"stage loss override {unknown[0]!r} is unknown; known: {', '.join(known)}")
        return replace(self, **values)  # type: ignore[arg-type]


TERMS = ("rec", "sp", "bind", "perp", "val")


def reconstruction(x: Tensor, x_hat: Tensor) -> Tensor:
    """L_rec: mean over rows of ||x - x_hat||^2; x, x_hat [B, D]."""
    return (x - x_hat).square().sum(dim=1).mean()


def sparsity(z_rest: Tensor, decoder: Tensor) -> Tensor:
    """L_sp: mean over rows of sum_j ||W_dec_j|| z_j; z_rest [B, K], decoder [K, D] as used in the reconstruction."""
    return (z_rest * decoder.norm(dim=1)).sum(dim=1).mean()


def binding(logits: Tensor, concept: Tensor) -> Tensor:
    """L_bind (AlignSAE): cross-entropy of logits [B, R] with concept [B], over rows with a label; 0 without any."""
    return _labelled_cross_entropy(logits, concept)


def value(answer_logits: Tensor, answer: Tensor) -> Tensor:
    """L_val (AlignSAE): cross-entropy of V(z_concept) [B, A] with answer [B], over rows that have one; 0 without any."""
    return _labelled_cross_entropy(answer_logits, answer)


def _labelled_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    labelled = (target >= 0).sum().clamp_min(1)
    return F.cross_entropy(logits, target, ignore_index=-1, reduction="sum") / labelled


def standardise(z: Tensor) -> Tensor:
    """Columns of z [B, n], centred and divided by their norm; a constant column becomes 0."""
    centred = z - z.mean(dim=0)
    return centred * inverse_norm(centred.square().sum(dim=0), z.square().sum(dim=0))


def inverse_norm(centred: Tensor, square: Tensor) -> Tensor:
    """One over the norm [n] of centred columns, from their sums of squares after and before centring; 0 for a constant column."""
    return torch.where(centred <= CONSTANT_SHARE * square, torch.zeros_like(centred), centred.clamp_min(1e-38).rsqrt())


def orthogonality(z_concept: Tensor, z_rest: Tensor) -> Tensor:
    """L_perp (AlignSAE): ||corr(z_concept, z_rest)||_F^2 over the rows given; [B, R] and [B, K]."""
    return (standardise(z_concept).T @ standardise(z_rest)).square().sum()
