"""The dense kernel: chunks of slots, nothing kept for backward but the weights, so memory does not grow with the code.

For banks where many slots are active (at initialisation about half are). Forward and backward visit the bank in chunks
of slots, large enough that threads seldom wait for each other; backward recomputes the code. Formulas: docs/design.md,
"One pass per bank".
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.kernels.gradients import gradient_buffer
from trainer.kernels.interface import BankStats, Orthogonality, StepContext, column_scale
from trainer.kernels.pull import Pull

CHUNK_ENTRIES = 1 << 22  # entries [B, chunk] of one temporary: 16 MiB in fp32


def dense_kernel(weights: BankWeights, recon: Tensor, context: StepContext) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One bank by dense products; see trainer/kernels/interface.py for shapes and duties."""
    W_enc, b_enc, W_dec, threshold, *_ = weights
    return _Dense.apply(W_enc, b_enc, W_dec, threshold, recon, context, weights)


@dataclass
class Correlation:
    """Of one bank over the global batch: mean [n], inv_norm [n] (0 for a constant slot), correlations corr [R, n]."""

    mean: Tensor
    inv_norm: Tensor
    corr: Tensor

    @classmethod
    def reduce(cls, total: Tensor, square: Tensor, cross: Tensor, perp: Orthogonality) -> "Correlation":
        """From local sums of z [n], z^2 [n] and concept^T z [R, n]; one reduction over data ranks."""
        packed = perp.reduce(torch.cat([total[None], square[None], cross]))
        mean, inv_norm = column_scale(packed[0], packed[1], perp.rows)
        return cls(mean, inv_norm, packed[2:] * inv_norm)


def _chunks(slots: int, rows: int) -> list[slice]:
    size = max(64, min(slots, CHUNK_ENTRIES // max(rows, 1)))
    return [slice(i, min(i + size, slots)) for i in range(0, slots, size)]


@dataclass
class Encoder:
    """The encoder and gate of a bank: W_enc [n, D], b_enc [n], threshold [n] or None (0), and the bandwidth of its
    pseudo-gradient or 0."""

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor | None
    bandwidth: float = 0.0

    def code(self, x: Tensor, c: slice) -> "Code":
        """Of rows x [B, D] in the slots of one chunk, in the dtype of x."""
        pre = torch.addmm(self.b_enc[c].to(x.dtype), x, self.W_enc[c].to(x.dtype).T)
        if self.threshold is None:
            return Code(pre.relu_())
        idle = pre <= self.threshold[c]
        near = (pre - self.threshold[c]).abs() < self.bandwidth / 2 if self.bandwidth else None
        return Code(pre.masked_fill_(idle, 0.0), idle, near)


@dataclass
class Code:
    """z [B, chunk], and where the gate let nothing pass: `idle` [B, chunk] bool, or None for where z is 0; `near`
    [B, chunk] bool: entries that give their thresholds a gradient, None without any."""

    z: Tensor
    idle: Tensor | None = None
    near: Tensor | None = None

    def active(self) -> Tensor:
        """Number of active entries, a scalar fp32."""
        if self.idle is None:
            return self.z.sign().sum(dtype=torch.float32)  # counting is ten times slower
        return (self.idle.numel() - self.idle.sum()).float()

    def fired(self, total: Tensor) -> Tensor:
        """Slots [chunk] that are active on some row; total [chunk]: sums of z over rows."""
        return total != 0 if self.idle is None else ~self.idle.all(dim=0)

    def entries(self, dead: Tensor, c: slice) -> Tensor:
        """Slots and rows [2, E] int64 of the active entries of the slots dead [n] of a bank that lie in this chunk."""
        active = self.z != 0 if self.idle is None else ~self.idle
        row, slot = (active & dead[c]).nonzero(as_tuple=True)
        return torch.stack([slot + c.start, row])

    def mask_(self, grad: Tensor) -> None:
        """Let a gradient [B, chunk] pass the gate backwards, in place."""
        if self.idle is None:
            torch.ops.aten.threshold_backward.grad_input(grad, self.z, 0, grad_input=grad)
        else:
            grad.masked_fill_(self.idle, 0.0)


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b; straight into `out` where the dtypes allow it."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        threshold: Tensor | None,
        recon: Tensor,
        context: StepContext,
        bank: BankWeights,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        decoder_norm, counted = bank.decoder_norm, bank.counted()
        x = context.operand
        encoder = Encoder(W_enc, b_enc, threshold)
        chunks = _chunks(W_enc.shape[0], x.shape[0])
        perp = context.perp
        norm = W_dec.norm(dim=1)
        recon = recon.clone()
        total = x.new_zeros(W_enc.shape[0], dtype=torch.float32)
        active, fired, entries = total.new_zeros(()), [], [torch.empty(2, 0, dtype=torch.int64, device=x.device)]
        kept = []  # the code of one bank, only while its correlations wait for the global sums
        square = torch.zeros_like(total)
        cross = total.new_zeros(0 if perp is None else perp.concept.shape[1], len(total))
        for c in chunks:
            code = encoder.code(x, c)
            z = code.z
            decoder = _decoder(W_dec[c], norm[c], decoder_norm).to(z.dtype)
            recon += z @ decoder
            active += code.active()
            total[c] = z.sum(dim=0, dtype=torch.float32)
            fired.append(code.fired(total[c]))
            if bank.dead is not None:
                entries.append(code.entries(bank.dead, c))
            if perp is not None:
                square[c] = z.float().square().sum(dim=0)
                cross[:, c] = perp.concept.T @ z.float()
                kept.append(z)
        stats = BankStats(torch.cat(fired), active)
        context.stats.append(stats)
        sp = active if bank.bandwidth else (total * norm).sum() if decoder_norm == "free" else total.sum()
        value = total.new_zeros(())
        if perp is not None:
            correlation = Correlation.reduce(total, square, cross, perp)
            stats.squares = correlation.corr.square().sum(dim=0)
            value = (stats.squares * counted).sum()
            for c, z in zip(chunks, kept, strict=True):
                _add_concept_gradient(perp, correlation, c, z, counted)
        ctx.save_for_backward(W_enc, b_enc, W_dec, threshold)
        ctx.context, ctx.bank, ctx.counted = context, bank, counted
        ctx.pull = Pull.of(bank, context, *torch.cat(entries, dim=1))
        return recon, sp.clone(), value, value.new_zeros(()) if ctx.pull is None else ctx.pull.value()

    @staticmethod
    def backward(ctx: Any, g_recon: Tensor, g_sp: Tensor, g_perp: Tensor, g_pull: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, b_enc, W_dec, threshold = ctx.saved_tensors
        bandwidth, decoder_norm = ctx.bank.bandwidth, ctx.bank.decoder_norm
        g_l1 = torch.zeros_like(g_sp) if bandwidth else g_sp
        context: StepContext = ctx.context
        perp = context.perp
        x = context.operand
        encoder = Encoder(W_enc, b_enc, threshold, bandwidth)
        chunks = _chunks(W_enc.shape[0], x.shape[0])
        correlation = None if perp is None else _correlation_again(x, encoder, perp, chunks)
        norm = W_dec.norm(dim=1)
        g_operand = g_recon.to(x.dtype)
        grad_enc, grad_b, grad_dec = gradient_buffer(W_enc), torch.empty_like(b_enc), gradient_buffer(W_dec)
        grad_threshold = torch.empty_like(b_enc) if bandwidth else None
        for c in chunks:
            code = encoder.code(x, c)
            z = code.z
            decoder = _decoder(W_dec[c], norm[c], decoder_norm)
            grad = (g_operand @ decoder.to(x.dtype).T).float()
            grad += g_l1 * norm[c] if decoder_norm == "free" else g_l1
            if perp is not None and correlation is not None:
                grad += g_perp * ctx.counted[c] * _slot_gradient(perp, correlation, c, z)
            if grad_threshold is not None and code.near is not None and threshold is not None:
                grad_threshold[c] = -((threshold[c] * grad + g_sp) * code.near).sum(dim=0) / bandwidth
            code.mask_(grad)
            _product(grad_enc[c], grad.to(x.dtype).T, x)
            grad_b[c] = grad.sum(dim=0)
            row_gradient = (z.T @ g_operand).float()
            if decoder_norm == "free":
                row_gradient += (
                    g_l1 * (z.sum(dim=0, dtype=torch.float32) / norm[c].clamp_min(1e-12))[:, None] * W_dec[c]
                )
            else:  # gradient of a row divided by its norm: what is orthogonal to the row
                along = (row_gradient * decoder).sum(dim=1, keepdim=True)
                row_gradient = (row_gradient - along * decoder) / norm[c].clamp_min(1e-12)[:, None]
            grad_dec[c] = row_gradient
        if ctx.pull is not None and grad_threshold is not None:
            ctx.pull.add_gradients(g_pull, (grad_enc, grad_b, grad_dec, grad_threshold))
        return grad_enc, grad_b, grad_dec, grad_threshold, g_recon, None, None


def _decoder(W_dec: Tensor, norm: Tensor, decoder_norm: str) -> Tensor:
    return W_dec if decoder_norm == "free" else W_dec / norm.clamp_min(1e-12)[:, None]


def _correlation_again(x: Tensor, encoder: Encoder, perp: Orthogonality, chunks: list[slice]) -> Correlation:
    """That of the forward pass: kept for all banks, [R, n] would be the R x S block that nobody may hold."""
    total, square, cross = [], [], []
    for c in chunks:
        z = encoder.code(x, c).z.float()
        total.append(z.sum(dim=0))
        square.append(z.square().sum(dim=0))
        cross.append(perp.concept.T @ z)
    return Correlation.reduce(torch.cat(total), torch.cat(square), torch.cat(cross, dim=1), perp)


def _add_concept_gradient(perp: Orthogonality, correlation: Correlation, c: slice, z: Tensor, counted: Tensor) -> None:
    """grad_concept += 2/nu_i ( sum_j w_j C_ij (z_bj - mu_j)/n_j - a_bi q_i ) over the slots of one chunk."""
    weighted = correlation.corr[:, c] * (correlation.inv_norm[c] * counted[c])  # [R, n]
    part = z.float() @ weighted.T - weighted @ correlation.mean[c]
    part -= perp.concept * (correlation.corr[:, c].square() @ counted[c])
    perp.grad_concept.add_(part * perp.inv_norm, alpha=2.0)


def _slot_gradient(perp: Orthogonality, correlation: Correlation, c: slice, z: Tensor) -> Tensor:
    """2/n_j ( (a C)_bj - (z_bj - mu_j)/n_j q_j ) [B, n]."""
    corr, inv_norm = correlation.corr[:, c], correlation.inv_norm[c]
    own = (z.float() - correlation.mean[c]) * (inv_norm * corr.square().sum(dim=0))
    return (perp.concept @ corr - own) * (2.0 * inv_norm)
