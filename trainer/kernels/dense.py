"""The dense kernel: chunks of slots, nothing kept for backward but the weights, so memory does not grow with the code.

For banks where many slots are active (at initialisation about half are). Forward and backward visit the bank in chunks of slots, large
enough that threads seldom wait for each other; backward recomputes the code. Formulas: docs/design.md, "One pass per bank".
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.kernels import native
from trainer.kernels.interface import BankStats, Orthogonality, StepContext, column_scale

CHUNK_ENTRIES = 1 << 22  # entries [B, chunk] of one temporary: 16 MiB in fp32


def dense_kernel(weights: BankWeights, recon: Tensor, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
    """One bank by dense products; see trainer/kernels/interface.py for shapes and duties."""
    return _Dense.apply(weights.W_enc, weights.b_enc, weights.W_dec, recon, context, weights.decoder_norm)


@dataclass
class Moments:
    """Global moments of one bank: mean [n], inv_norm [n] (0 for a constant slot) and the correlations corr [R, n]."""

    mean: Tensor
    inv_norm: Tensor
    corr: Tensor

    @classmethod
    def reduce(cls, total: Tensor, square: Tensor, cross: Tensor, perp: Orthogonality) -> "Moments":
        """From local sums of z [n], z^2 [n] and concept^T z [R, n]; one reduction over data ranks."""
        packed = perp.reduce(torch.cat([total[None], square[None], cross]))
        mean, inv_norm = column_scale(packed[0], packed[1], perp.rows)
        return cls(mean, inv_norm, packed[2:] * inv_norm)


def _chunks(slots: int, rows: int) -> list[slice]:
    size = max(64, min(slots, CHUNK_ENTRIES // max(rows, 1)))
    return [slice(i, min(i + size, slots)) for i in range(0, slots, size)]


def _code(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """ReLU(x W_enc^T + b_enc) in the dtype of x."""
    return torch.addmm(b_enc.to(x.dtype), x, W_enc.to(x.dtype).T).relu_()


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b; straight into `out` where the dtypes allow it."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, recon: Tensor, context: StepContext, decoder_norm: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = context.operand
        chunks = _chunks(W_enc.shape[0], x.shape[0])
        perp = context.perp
        norm = W_dec.norm(dim=1)
        recon = recon.clone()
        total = x.new_zeros(W_enc.shape[0], dtype=torch.float32)
        active = total.new_zeros(())
        kept = []  # the code of one bank, only while its correlations wait for the global moments
        square = torch.zeros_like(total)
        cross = total.new_zeros(0 if perp is None else perp.concept.shape[1], len(total))
        for c in chunks:
            z = _code(x, W_enc[c], b_enc[c])
            decoder = _decoder(W_dec[c], norm[c], decoder_norm).to(z.dtype)
            recon += z @ decoder
            active += z.sign().sum(dtype=torch.float32)  # counting is ten times slower
            total[c] = z.sum(dim=0, dtype=torch.float32)
            if perp is not None:
                square[c] = z.float().square().sum(dim=0)
                cross[:, c] = perp.concept.T @ z.float()
                kept.append(z)
        context.stats.append(BankStats(total != 0, active))
        sp = (total * norm).sum() if decoder_norm == "free" else total.sum()
        value = total.new_zeros(())
        if perp is not None:
            moments = Moments.reduce(total, square, cross, perp)
            value = moments.corr.square().sum()
            for c, z in zip(chunks, kept, strict=True):
                _add_concept_gradient(perp, moments, c, z)
        ctx.save_for_backward(W_enc, b_enc, W_dec)
        ctx.context, ctx.decoder_norm = context, decoder_norm
        return recon, sp, value

    @staticmethod
    def backward(ctx: Any, g_recon: Tensor, g_sp: Tensor, g_perp: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, b_enc, W_dec = ctx.saved_tensors
        context: StepContext = ctx.context
        perp = context.perp
        x = context.operand
        chunks = _chunks(W_enc.shape[0], x.shape[0])
        moments = None if perp is None else _moments_again(x, W_enc, b_enc, perp, chunks)
        norm = W_dec.norm(dim=1)
        g_low = g_recon.to(x.dtype)
        grad_enc, grad_b, grad_dec = native.buffer_like(W_enc), torch.empty_like(b_enc), native.buffer_like(W_dec)
        for c in chunks:
            z = _code(x, W_enc[c], b_enc[c])
            decoder = _decoder(W_dec[c], norm[c], ctx.decoder_norm)
            grad = (g_low @ decoder.to(x.dtype).T).float()
            grad += g_sp * norm[c] if ctx.decoder_norm == "free" else g_sp
            if perp is not None and moments is not None:
                grad += g_perp * _slot_gradient(perp, moments, c, z)
            torch.ops.aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad)
            _product(grad_enc[c], grad.to(x.dtype).T, x)
            grad_b[c] = grad.sum(dim=0)
            row_gradient = (z.T @ g_low).float()
            if ctx.decoder_norm == "free":
                row_gradient += (
                    g_sp * (z.sum(dim=0, dtype=torch.float32) / norm[c].clamp_min(1e-12))[:, None] * W_dec[c]
                )
            else:  # gradient of a row divided by its norm: what is orthogonal to the row
                along = (row_gradient * decoder).sum(dim=1, keepdim=True)
                row_gradient = (row_gradient - along * decoder) / norm[c].clamp_min(1e-12)[:, None]
            grad_dec[c] = row_gradient
        return grad_enc, grad_b, grad_dec, g_recon, None, None


def _decoder(W_dec: Tensor, norm: Tensor, decoder_norm: str) -> Tensor:
    return W_dec if decoder_norm == "free" else W_dec / norm.clamp_min(1e-12)[:, None]


def _moments_again(x: Tensor, W_enc: Tensor, b_enc: Tensor, perp: Orthogonality, chunks: list[slice]) -> Moments:
    """The moments of the forward pass, recomputed: keeping [R, n] of every bank would be the R x S block nobody may hold."""
    total, square, cross = [], [], []
    for c in chunks:
        z = _code(x, W_enc[c], b_enc[c]).float()
        total.append(z.sum(dim=0))
        square.append(z.square().sum(dim=0))
        cross.append(perp.concept.T @ z)
    return Moments.reduce(torch.cat(total), torch.cat(square), torch.cat(cross, dim=1), perp)


def _add_concept_gradient(perp: Orthogonality, moments: Moments, c: slice, z: Tensor) -> None:
    """grad_concept += 2/nu_i ( sum_j C_ij (z_bj - mu_j)/n_j - a_bi q_i ) over the slots of one chunk."""
    weighted = moments.corr[:, c] * moments.inv_norm[c]  # [R, n]
    part = z.float() @ weighted.T - weighted @ moments.mean[c]
    part -= perp.concept * moments.corr[:, c].square().sum(dim=1)
    perp.grad_concept.add_(part * perp.inv_norm, alpha=2.0)


def _slot_gradient(perp: Orthogonality, moments: Moments, c: slice, z: Tensor) -> Tensor:
    """2/n_j ( (a C)_bj - (z_bj - mu_j)/n_j q_j ) [B, n]."""
    corr, inv_norm = moments.corr[:, c], moments.inv_norm[c]
    own = (z.float() - moments.mean[c]) * (inv_norm * corr.square().sum(dim=0))
    return (perp.concept @ corr - own) * (2.0 * inv_norm)
