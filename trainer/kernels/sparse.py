"""The sparse kernel for CPU: one encoder product, and everything else on the active entries.

Where z is 0 so is its gradient in every term, so an exact step needs one dense product. Its arithmetic may be bf16 or int16: it only says where to
look; the pre-activations that count are computed again in fp32 (trainer/kernels/encode.cpp, sparse.cpp). What is kept for backward is O(active).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.interface import BankStats, BankStep, PerpStep, column_scale
from trainer.kernels.pairs import RowPairs

ops = torch.ops.alignsae
# Rows in a block of the encoder product, where it is fastest: bf16 on AVX-512, fp32 and int16 on AVX2.
BLOCK_ROWS = {torch.bfloat16: 64, torch.float32: 32, torch.int16: 16}


def sparse_kernel(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, recon: Tensor, step: BankStep
) -> tuple[Tensor, Tensor, Tensor]:
    """One bank on its active entries; see trainer/kernels/interface.py for shapes and duties."""
    return _Sparse.apply(W_enc, b_enc, W_dec, recon, step)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, recon: Tensor, step: BankStep
    ) -> tuple[Tensor, Tensor, Tensor]:
        unit = step.decoder_norm == "unit"
        blocks = step.once("blocks", lambda: in_blocks(_operand(step)))
        start, row, z = ops.encode(W_enc, b_enc, step.x, blocks, step.reach)
        by_row = ops.by_row(start, row, len(step.x))
        recon, sp = ops.decode(W_dec, recon.contiguous(), z, *by_row, unit)
        fired = start.diff() > 0
        step.stats.append(BankStats(fired, recon.new_tensor(float(row.numel()))))
        value = recon.new_zeros(())
        moments, known = None, z.new_zeros(0)
        pairs = None if step.perp is None else step.perp.pairs
        if step.perp is not None and pairs is not None and pairs.cheaper(start.diff()):
            value, known = _by_pairs(start, row, z, by_row, step.perp, pairs)
        elif step.perp is not None:
            columns, place = _columns(fired, step.perp)
            packed = _moments(start, row, z, columns, step.perp)
            mean, inv_norm = column_scale(packed[:, 0], packed[:, 1], step.perp.rows)
            moments = (columns, place, mean, inv_norm)
            value = _add_concept_gradient(step.perp, by_row, z, place, mean, inv_norm, packed)
        ctx.save_for_backward(W_enc, b_enc, W_dec)
        ctx.entries = start, row, z, moments, known
        ctx.step = step
        return recon, recon.new_tensor(sp), value

    @staticmethod
    def backward(ctx: Any, g_recon: Tensor, g_sp: Tensor, g_perp: Tensor) -> tuple[Tensor | None, ...]:
        step: BankStep = ctx.step
        W_enc, b_enc, W_dec = ctx.saved_tensors
        start, row, z, moments, known = ctx.entries
        none = W_dec.new_zeros(0, 0)
        place, mean, inv_norm = start, none, none
        concept = packed = none
        if step.perp is not None and moments is not None:
            columns, place, mean, inv_norm = moments
            concept = step.perp.concept.contiguous()
            # Again: kept for all banks, the correlations would be the R x S block that nobody may hold.
            packed = _moments(start, row, z, columns, step.perp)
        grads = [ops.buffer(W_enc.shape), torch.empty_like(b_enc), ops.buffer(W_dec.shape)]
        unit = step.decoder_norm == "unit"
        entries = (W_dec, step.x, g_recon.contiguous(), start, row, z)
        squares = ops.backward(
            *entries, float(g_sp), unit, float(g_perp), concept, packed, mean, inv_norm, place, known, *grads
        )
        ops.note_square(grads[0], squares[0])
        ops.note_square(grads[2], squares[1])
        return *grads, g_recon, None


def in_blocks(x: Tensor) -> Tensor:
    """Rows [B, D] of fp32, bf16 or int16 as `encode` multiplies with them: [blocks, words, rows of a block], a word one number of fp32, or two others."""
    rows, narrow = BLOCK_ROWS[x.dtype], x.element_size() == 2
    count = -(-len(x) // rows)
    words = F.pad(x, (0, x.shape[1] % 2 if narrow else 0, 0, count * rows - len(x)))
    if narrow:
        words = words.view(torch.int32)
    blocks = words.view(count, rows, words.shape[1]).transpose(1, 2)
    return blocks.clone(memory_format=torch.contiguous_format).view(x.dtype)


def in_int16(x: Tensor, reach: float) -> Tensor:
    """Rows [B, D] of norm at most `reach` as int16 numbers; trainer/kernels/product.h says why in this scale."""
    return (x * (ops.short_norm() / reach if reach > 0 else 0.0)).round().to(torch.int16)


def _operand(step: BankStep) -> Tensor:
    """The rows in the arithmetic of the encoder product: bf16 where the run and the CPU have it, else the faster of int16 and fp32."""
    if step.x_low is not None and ops.low_products():
        return step.x_low
    return in_int16(step.x, step.reach) if ops.short_products() else step.x


def _columns(fired: Tensor, perp: PerpStep) -> tuple[Tensor, Tensor]:
    """Slots [m] active on some data rank, and the place [n] of each slot among them."""
    anywhere = perp.reduce(fired.float()) > 0
    return anywhere.nonzero()[:, 0], anywhere.cumsum(0) - 1


def _moments(start: Tensor, row: Tensor, z: Tensor, columns: Tensor, perp: PerpStep) -> Tensor:
    """[m, R + 2]: sums of z, z^2 and concept^T z of the columns, over the global batch; one reduction."""
    # Room for all slots of the bank, so that every bank of this size finds the same buffer again.
    out = ops.buffer([start.numel() - 1, perp.concept.shape[1] + 2])[: columns.numel()]
    ops.moments(start, row, z, perp.concept.contiguous(), columns, out)
    return perp.reduce(out)


def _by_pairs(
    start: Tensor, row: Tensor, z: Tensor, by_row: tuple[Tensor, ...], perp: PerpStep, pairs: RowPairs
) -> tuple[Tensor, Tensor]:
    """This bank's part of perp, and its gradient [E] with respect to z; adds to `pairs.shared`."""
    sums = z.new_empty(start.numel() - 1, 2)
    ops.moments(start, row, z, z.new_empty(len(pairs.gram), 0), torch.arange(len(sums)), sums)
    mean, inv_norm = column_scale(sums[:, 0], sums[:, 1], perp.rows)
    products = ops.pair_products(start, row, z, *by_row, inv_norm, pairs.gram, pairs.shared)
    return z.new_tensor(ops.pair_slopes(start, z, mean, inv_norm, products)), products


def _add_concept_gradient(
    perp: PerpStep, by_row: tuple[Tensor, ...], z: Tensor, place: Tensor, mean: Tensor, inv_norm: Tensor, packed: Tensor
) -> Tensor:
    """Add this bank's part of d perp / d z_concept to `perp.grad_concept`; uses up `packed`; returns this bank's part of perp."""
    q, shift = ops.weigh(packed, mean, inv_norm)
    ops.add_concept_gradient(
        *by_row, z, place, packed, shift, q, perp.concept.contiguous(), perp.inv_norm, perp.grad_concept
    )
    return q.sum()
