"""What stands on the concept slots, on a device: a few launches for what plain PyTorch does in many.

Shapes: B rows (at least one), D width, R concepts (at least one), A answers, K free slots. The oracles are the plain
functions of trainer/heads.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.following import DEPENDENCE_RATE, DEPENDENT, INDEPENDENT
from trainer.kernels.interface import Orthogonality
from trainer.kernels.triton import concepts
from trainer.kernels.triton.launching import block, warps
from trainer.losses import CONSTANT_SHARE

FIGURES = 4  # that concepts.encode_row writes
MANY = 1024  # rows, or free slots, that a program takes at a time


def concept_slots(weights: BankWeights, x: Tensor, concept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Code [B, R], share of the reconstruction [B, D], and sums over rows: norm times z, the binding term (softmax over
    pre-activations), and without gradient [2] active entries and rows whose largest logit is their concept's.

    x [B, D] in the dtype of the products; concept [B, 1], see trainer.labels; the norm of decoder rows is free.
    """
    return _Slots.apply(weights.W_enc, weights.b_enc, weights.W_dec, x, concept)


class _Slots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, x: Tensor, concept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        (B, _), R, same = x.shape, len(W_enc), x.dtype == torch.float32
        product = x @ W_enc.to(x.dtype).T
        norm = torch.linalg.vector_norm(W_dec, dim=1)
        z, slope = (torch.empty(B, R, device=x.device) for _ in range(2))
        operand = z if same else torch.empty_like(product)
        figures = torch.empty(B, FIGURES, device=x.device)
        size = block(R)
        concepts.encode_row[(B,)](
            product, b_enc, norm, concept, z, operand, slope, figures, R, BR=size, SAME=same, num_warps=warps(size)
        )
        x_hat = (operand @ W_dec.to(x.dtype)).float()
        bind, sparse, *counts = figures.sum(dim=0).split([1, 1, 2])
        ctx.save_for_backward(W_dec, x, norm, z, operand, slope)
        ctx.mark_non_differentiable(*counts)
        return z, x_hat, sparse.view(()), bind.view(()), *counts

    @staticmethod
    def backward(
        ctx: Any, g_z: Tensor | None, g_x_hat: Tensor, g_sp: Tensor, g_bind: Tensor, _: None
    ) -> tuple[Tensor | None, ...]:
        W_dec, x, norm, z, operand, slope = ctx.saved_tensors
        (B, R), D, same = z.shape, x.shape[1], x.dtype == torch.float32
        upstream = g_x_hat.to(x.dtype)
        above = upstream @ W_dec.to(x.dtype).T
        g_pre = torch.empty_like(z)
        g_operand = g_pre if same else torch.empty_like(operand)
        size = block(R)
        concepts.encode_row_backward[(B,)](
            above,
            z if g_z is None else g_z.contiguous(),
            g_bind,
            g_sp,
            norm,
            slope,
            z,
            g_pre,
            g_operand,
            R,
            BR=size,
            CODE=g_z is not None,
            SAME=same,
            num_warps=warps(size),
        )
        grad_enc, grad_dec = (g_operand.T @ x).float(), (operand.T @ upstream).float()
        grad_b, size = torch.empty(R, device=x.device), block(D)
        concepts.slot_backward[(R,)](
            g_pre, z, g_sp, norm, W_dec, grad_b, grad_dec, B, R, D, BB=MANY, BD=size, num_warps=warps(size)
        )
        return grad_enc, grad_b, grad_dec, None, None


def cross_entropy(logits: Tensor, answer: Tensor) -> Tensor:
    """Cross-entropy of logits [B, A] with answer [B], -1 = none, summed over rows."""
    return _Answers.apply(logits, answer)


class _Answers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, answer: Tensor) -> Tensor:
        (B, A), size = logits.shape, block(logits.shape[1])
        loss, slope = logits.new_empty(B), torch.empty_like(logits)
        concepts.answer_row[(B,)](logits, answer, loss, slope, A, BA=size, num_warps=warps(size))
        ctx.save_for_backward(slope)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * upstream, None


def standardise(z: Tensor, rows: Tensor, reduce: Callable[[Tensor], Tensor]) -> Orthogonality:
    """Orthogonality.standardise, for z [B, R] and the global number of rows, a scalar of any size."""
    B, R = z.shape
    size = columns(R)
    groups = triton.cdiv(R, size["BC"])
    totals, squares = z.new_empty(R), z.new_empty(2, R)
    concepts.code_totals[(groups,)](z, totals, B, R, **size)
    totals = reduce(totals)
    concepts.code_squares[(groups,)](z, totals, rows, squares, B, R, **size)
    squares = reduce(squares)
    concept, gradient, inv_norm = torch.empty_like(z), torch.empty_like(z), z.new_empty(R + 1)
    grid = triton.cdiv(B, size["BB"]), groups
    concepts.standardise[grid](
        z, totals, squares, rows, concept, inv_norm, gradient, B, R, SHARE=CONSTANT_SHARE, **size
    )
    return Orthogonality(concept, inv_norm[:R], inv_norm[R], reduce, gradient)


def columns(concepts: int) -> dict[str, int]:
    """Rows and concept slots of a tile of a program that goes through columns."""
    width = min(32, block(concepts))
    return {"BB": 2048 // width, "BC": width}


def counted(dependence: Tensor, out: Tensor) -> Tensor:
    """following.perp_weight of a dependence [K], written to `out` [K]."""
    grid = (triton.cdiv(len(out), MANY),)
    concepts.counts_from[grid](dependence, out, len(out), LOW=INDEPENDENT, HIGH=DEPENDENT, BK=MANY)
    return out


def follow(dependence: Tensor, squares: Tensor, rows: Tensor, inv_norm: Tensor, made: Tensor) -> None:
    """following.followed_dependence, in place; inv_norm [R]: 0 of concept slots that are constant."""
    K, R = len(dependence), len(inv_norm)
    concepts.follow[(triton.cdiv(K, MANY),)](
        dependence, squares, rows, inv_norm, made, K, R, RATE=DEPENDENCE_RATE, BK=MANY, BR=block(R)
    )
