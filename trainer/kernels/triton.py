"""The sparse kernel for CUDA in Triton: a fused encoder (product, bias, gate, compaction) and two kernels on entries.

The step is that of trainer/kernels/sparse.py. Entries are kept slot by slot: those of slot j are start[j] ..
start[j + 1], each with its row and its pre-activation z above the threshold of the slot. Runs on CPU under
TRITON_INTERPRET=1, which is how the tests run it.

Shapes: B rows, D width, R concepts, n slots of the bank, E active entries.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.kernels.interface import BankStats, Orthogonality, StepContext, column_scale

FIRST_CAPACITY = 1 / 16  # share of entries that the first attempt makes room for
TILE, TILE_WIDTH = tl.constexpr(64), tl.constexpr(32)  # rows and slots of a tile of the product, and numbers of a step


def triton_kernel(weights: BankWeights, recon: Tensor, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
    """One bank on its active entries; see trainer/kernels/interface.py for shapes and duties."""
    W_enc, b_enc, W_dec, threshold, *_ = weights
    return _Triton.apply(W_enc, b_enc, W_dec, threshold, recon, context, weights)


@triton.jit
def _encode(x, W, bias, found, B, n, D, capacity):
    """Candidates of one tile of x W^T + bias: entries that the product does not put below 0, in no order.

    found [1 + capacity] int64: their number, which may be above `capacity`, and slot * B + row of those that have room.
    """
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    slots = tl.program_id(0) * TILE + tl.arange(0, TILE)
    width = tl.arange(0, TILE_WIDTH)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for d in range(0, D, TILE_WIDTH):
        inside = (d + width) < D
        a = tl.load(
            x + rows[:, None].to(tl.int64) * D + d + width[None, :],
            mask=(rows[:, None] < B) & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            W + slots[None, :].to(tl.int64) * D + d + width[:, None],
            mask=(slots[None, :] < n) & inside[:, None],
            other=0.0,
        )
        total = tl.dot(a, w, total, input_precision="ieee")
    pre = total + tl.load(bias + slots, mask=slots < n, other=0.0)[None, :]
    # Not "above 0": what is not a number has to reach the loss.
    active = tl.where(pre <= 0, 0, 1) * ((rows[:, None] < B) & (slots[None, :] < n)).to(tl.int32)
    flat = tl.reshape(active, (TILE * TILE,))
    base = tl.atomic_add(found, tl.sum(flat, axis=0).to(tl.int64))
    place = base + tl.cumsum(flat, axis=0) - 1
    key = tl.reshape(slots[None, :].to(tl.int64) * B + rows[:, None], (TILE * TILE,))
    tl.store(found + 1 + place, key, mask=(flat > 0) & (place < capacity))


@triton.jit
def _entry_dot(left, right, left_index, right_index, out, D, BD: tl.constexpr):
    """out[e] = left[left_index[e]] . right[right_index[e]]"""
    e = tl.program_id(0).to(tl.int64)
    a = left + tl.load(left_index + e).to(tl.int64) * D
    b = right + tl.load(right_index + e).to(tl.int64) * D
    width = tl.arange(0, BD)
    total = tl.zeros((BD,), dtype=tl.float32)
    for d in range(0, D, BD):
        inside = (d + width) < D
        total += tl.load(a + d + width, mask=inside, other=0.0) * tl.load(b + d + width, mask=inside, other=0.0)
    tl.store(out + e, tl.sum(total, axis=0))


@triton.jit
def _segment_sum(source, start, index, weight, out, D, BD: tl.constexpr):
    """out[i] = sum over the entries e of segment i of weight[e] source[index[e]]"""
    i = tl.program_id(0).to(tl.int64)
    width = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), dtype=tl.float32)
    for e in range(tl.load(start + i), tl.load(start + i + 1)):
        row = tl.load(index + e).to(tl.int64)
        total += tl.load(weight + e) * tl.load(source + row * D + width, mask=width < D, other=0.0)
    tl.store(out + i * D + width, total, mask=width < D)


def _block(width: int) -> int:
    return min(1024, triton.next_power_of_2(max(width, 16)))


def entry_dot(left: Tensor, right: Tensor, left_index: Tensor, right_index: Tensor) -> Tensor:
    """[E] products of the rows that the two indices [E] name; left, right fp32 of one width."""
    out = left.new_empty(left_index.numel())
    if out.numel() and left.shape[1]:
        left, right = left.contiguous(), right.contiguous()
        _entry_dot[(out.numel(),)](left, right, left_index, right_index, out, left.shape[1], BD=_block(left.shape[1]))
        return out
    return out.zero_()


def segment_sum(source: Tensor, start: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """[N, D]: row i is the sum of weight[e] source[index[e]] over e in start[i] .. start[i + 1]."""
    width = source.shape[1]
    out = source.new_empty(start.numel() - 1, width)
    if out.numel() and source.numel():
        block = min(128, _block(width))
        grid = (out.shape[0], triton.cdiv(width, block))
        _segment_sum[grid](source.contiguous(), start, index, weight, out, width, BD=block)
        return out
    return out.zero_()


@dataclass
class Entries:
    """Active entries of a bank, slot by slot, and the order that sorts them by row."""

    start: Tensor  # [n + 1]
    row: Tensor  # [E]
    slot: Tensor  # [E]
    z: Tensor  # [E]
    by_row: Tensor  # [E] positions
    row_start: Tensor  # [B + 1]

    @classmethod
    def find(cls, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, context: StepContext) -> "Entries":
        """Candidates from the product, pre-activations again in fp32, what is above threshold [n] (None: 0) kept."""
        n, B = len(W_enc), len(context.x)
        theta = torch.zeros_like(b_enc) if threshold is None else threshold
        # Sorted, since atomics hand out places in no order and a step has to be reproducible.
        key = torch.sort(_candidates(W_enc, b_enc, theta, context)).values
        slot, row = key // max(B, 1), key % max(B, 1)
        pre = entry_dot(W_enc, context.x, slot, row) + b_enc[slot]
        keep = ~(pre <= theta[slot])
        slot, row, z = slot[keep], row[keep], pre[keep]
        by_row = torch.sort(row, stable=True).indices
        return cls(_starts(slot, n), row, slot, z, by_row, _starts(row, B))

    def over_rows(self, source: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """[B, D]: for every row the sum of weight[e] source[index[e]] over its entries."""
        return segment_sum(source, self.row_start, index[self.by_row], weight[self.by_row])


def _candidates(W_enc: Tensor, b_enc: Tensor, theta: Tensor, context: StepContext) -> Tensor:
    """slot * B + row of the entries that the product does not rule out, in no order."""
    operand, (n, D), B = context.operand, W_enc.shape, len(context.x)
    if not B:
        return torch.empty(0, dtype=torch.int64, device=W_enc.device)
    weights = W_enc.to(operand.dtype).contiguous()
    # A product off by its arithmetic's rounding must not lose an entry; the margin is that of product.h.
    error = 2.0**-8 if operand.dtype == torch.bfloat16 else 2.0**-18
    spread = 2 * context.max_row_norm * W_enc.norm(dim=1) / D**0.5
    lenient = b_enc - theta + error * (b_enc.abs() + theta.abs() + spread)
    capacity = max(256, int(B * n * FIRST_CAPACITY))
    grid = (triton.cdiv(n, TILE.value), triton.cdiv(B, TILE.value))
    while True:
        found = torch.empty(1 + capacity, dtype=torch.int64, device=W_enc.device)
        found[0] = 0
        _encode[grid](operand.contiguous(), weights, lenient, found, B, n, D, capacity)
        count = int(found[0])
        if count <= capacity:
            return found[1 : 1 + count]
        capacity = count


def _starts(index: Tensor, size: int) -> Tensor:
    counts = torch.bincount(index, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class _Triton(torch.autograd.Function):
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        decoder_norm, counted = bank.decoder_norm, bank.counted()
        entries = Entries.find(W_enc, b_enc, threshold, context)
        norm = W_dec.norm(dim=1)
        unit_rows = decoder_norm == "unit"
        used = entries.z / norm.clamp_min(1e-12)[entries.slot] if unit_rows else entries.z
        out = recon + entries.over_rows(W_dec, entries.slot, used)
        sp = entries.z.sum() if unit_rows else (entries.z * norm[entries.slot]).sum()
        stats = BankStats(entries.start.diff() > 0, recon.new_tensor(float(entries.z.numel())))
        context.stats.append(stats)
        value = recon.new_zeros(())
        ctx.scales = None
        if context.perp is not None:
            total, square, cross = _column_sums(entries, context.perp)
            mean, inv_norm = column_scale(total, square, context.perp.rows)
            corr = cross * inv_norm[:, None]
            stats.squares = corr.square().sum(dim=1)
            value = (stats.squares * counted).sum()
            _add_concept_gradient(context.perp, entries, mean, inv_norm, corr, counted)
            ctx.scales = mean, inv_norm
        ctx.save_for_backward(W_enc, b_enc, W_dec)
        ctx.entries, ctx.context, ctx.decoder_norm, ctx.counted = entries, context, decoder_norm, counted
        return out, sp, value

    @staticmethod
    def backward(ctx: Any, g_recon: Tensor, g_sp: Tensor, g_perp: Tensor) -> tuple[Tensor | None, ...]:
        _, _, W_dec = ctx.saved_tensors
        context: StepContext = ctx.context
        e: Entries = ctx.entries
        unit_rows = ctx.decoder_norm == "unit"
        norm = W_dec.norm(dim=1).clamp_min(1e-12)
        slope = entry_dot(g_recon, W_dec, e.row, e.slot)
        slope = slope / norm[e.slot] + g_sp if unit_rows else slope + g_sp * norm[e.slot]
        if context.perp is not None:
            mean, inv_norm = ctx.scales
            corr = _column_sums(e, context.perp)[2] * inv_norm[:, None]
            own = (e.z - mean[e.slot]) * (inv_norm * corr.square().sum(dim=1))[e.slot]
            across = entry_dot(context.perp.concept, corr, e.row, e.slot)
            slope = slope + g_perp * 2 * (ctx.counted * inv_norm)[e.slot] * (across - own)
        grad_enc = segment_sum(context.x, e.start, e.row, slope)
        ones = slope.new_ones(len(context.x), 1)
        grad_b = segment_sum(ones, e.start, e.row, slope)[:, 0]
        grad_dec = segment_sum(g_recon, e.start, e.row, e.z)
        if unit_rows:  # gradient of a row divided by its norm: what is orthogonal to the row
            decoder = W_dec / norm[:, None]
            grad_dec = (grad_dec - (grad_dec * decoder).sum(dim=1, keepdim=True) * decoder) / norm[:, None]
        else:
            total = segment_sum(ones, e.start, e.row, e.z)[:, 0]
            grad_dec += (g_sp * total / norm)[:, None] * W_dec
        return grad_enc, grad_b, grad_dec, None, g_recon, None, None


def _column_sums(e: Entries, perp: Orthogonality) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of z [n] and z^2 [n], and concept^T z [n, R], over the global batch; one reduction."""
    concept = torch.cat([perp.concept, torch.ones_like(perp.concept[:, :1])], dim=1)
    first = segment_sum(concept, e.start, e.row, e.z)
    square = segment_sum(torch.ones_like(perp.concept[:, :1]), e.start, e.row, e.z.square())
    packed = perp.reduce(torch.cat([first, square], dim=1))
    return packed[:, -2], packed[:, -1], packed[:, :-2]


def _add_concept_gradient(
    perp: Orthogonality, e: Entries, mean: Tensor, inv_norm: Tensor, corr: Tensor, counted: Tensor
) -> None:
    """Add this bank's part of d perp / d z_concept to `perp.grad_concept`."""
    q = counted @ corr.square()
    weighted = corr * (inv_norm * counted)[:, None]
    part = e.over_rows(weighted, e.slot, e.z) - weighted.T @ mean - perp.concept * q
    perp.grad_concept.add_(part * perp.inv_norm, alpha=2.0)
