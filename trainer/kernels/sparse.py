"""The sparse kernel for CPU: one encoder product, and everything else on the active entries.

Where z is 0 so is its gradient in every term, so an exact step needs one dense product. Its arithmetic may be bf16 or int16: it only says where to
look; the pre-activations that count are computed again in fp32 (trainer/kernels/encode.cpp, sparse.cpp). What is kept for backward is O(active).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.kernels.interface import BankStats, Orthogonality, StepContext, column_scale
from trainer.kernels.pairs import RowPairs

ops = torch.ops.alignsae
# Rows in a block of the encoder product, where it is fastest: bf16 on AVX-512, fp32 and int16 on AVX2.
BLOCK_ROWS = {torch.bfloat16: 64, torch.float32: 32, torch.int16: 16}


def sparse_kernel(weights: BankWeights, recon: Tensor, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
    """One bank on its active entries; see trainer/kernels/interface.py for shapes and duties."""
    return _Sparse.apply(weights.W_enc, weights.b_enc, weights.W_dec, recon, context, weights.decoder_norm)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, recon: Tensor, context: StepContext, decoder_norm: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        unit = decoder_norm == "unit"
        blocks = context.once("blocks", lambda: in_blocks(_operand(context)))
        start, row, z = ops.encode(W_enc, b_enc, context.x, blocks, context.max_row_norm)
        by_row = ops.by_row(start, row, len(context.x))
        recon, sp = ops.decode(W_dec, recon.contiguous(), z, *by_row, unit)
        fired = start.diff() > 0
        context.stats.append(BankStats(fired, recon.new_tensor(float(row.numel()))))
        value = recon.new_zeros(())
        moments, known = None, z.new_zeros(0)
        pairs = None if context.perp is None else context.perp.pairs
        if context.perp is not None and pairs is not None and pairs.cheaper(start.diff()):
            value, known = _by_pairs(start, row, z, by_row, context.perp, pairs)
        elif context.perp is not None:
            columns, place = _columns(fired, context.perp)
            packed = _moments(start, row, z, columns, context.perp)
            mean, inv_norm = column_scale(packed[:, 0], packed[:, 1], context.perp.rows)
            moments = (columns, place, mean, inv_norm)
            value = _add_concept_gradient(context.perp, by_row, z, place, mean, inv_norm, packed)
        ctx.save_for_backward(W_enc, b_enc, W_dec)
        ctx.entries = start, row, z, moments, known
        ctx.context, ctx.decoder_norm = context, decoder_norm
        return recon, recon.new_tensor(sp), value

    @staticmethod
    def backward(ctx: Any, g_recon: Tensor, g_sp: Tensor, g_perp: Tensor) -> tuple[Tensor | None, ...]:
        context: StepContext = ctx.context
        W_enc, b_enc, W_dec = ctx.saved_tensors
        start, row, z, moments, known = ctx.entries
        none = W_dec.new_zeros(0, 0)
        place, mean, inv_norm = start, none, none
        concept = packed = none
        if context.perp is not None and moments is not None:
            columns, place, mean, inv_norm = moments
            concept = context.perp.concept.contiguous()
            # Again: kept for all banks, the correlations would be the R x S block that nobody may hold.
            packed = _moments(start, row, z, columns, context.perp)
        grads = [ops.buffer(W_enc.shape), torch.empty_like(b_enc), ops.buffer(W_dec.shape)]
        unit = ctx.decoder_norm == "unit"
        entries = (W_dec, context.x, g_recon.contiguous(), start, row, z)
        squares = ops.backward(
            *entries, float(g_sp), unit, float(g_perp), concept, packed, mean, inv_norm, place, known, *grads
        )
        ops.note_square(grads[0], squares[0])
        ops.note_square(grads[2], squares[1])
        return *grads, g_recon, None, None


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


def _operand(context: StepContext) -> Tensor:
    """The rows in the arithmetic of the encoder product: bf16 where the run and the CPU have it, else the faster of int16 and fp32."""
    if context.x_bf16 is not None and ops.low_products():
        return context.x_bf16
    return in_int16(context.x, context.max_row_norm) if ops.short_products() else context.x


def _columns(fired: Tensor, perp: Orthogonality) -> tuple[Tensor, Tensor]:
    """Slots [m] active on some data rank, and the place [n] of each slot among them."""
    anywhere = perp.reduce(fired.float()) > 0
    return anywhere.nonzero()[:, 0], anywhere.cumsum(0) - 1


def _moments(start: Tensor, row: Tensor, z: Tensor, columns: Tensor, perp: Orthogonality) -> Tensor:
    """[m, R + 2]: sums of z, z^2 and concept^T z of the columns, over the global batch; one reduction."""
    # Room for all slots of the bank, so that every bank of this size finds the same buffer again.
    out = ops.buffer([start.numel() - 1, perp.concept.shape[1] + 2])[: columns.numel()]
    ops.moments(start, row, z, perp.concept.contiguous(), columns, out)
    return perp.reduce(out)


def _by_pairs(
    start: Tensor, row: Tensor, z: Tensor, by_row: tuple[Tensor, ...], perp: Orthogonality, pairs: RowPairs
) -> tuple[Tensor, Tensor]:
    """This bank's part of perp, and its gradient [E] with respect to z; adds to `pairs.shared`."""
    sums = z.new_empty(start.numel() - 1, 2)
    ops.moments(start, row, z, z.new_empty(len(pairs.gram), 0), torch.arange(len(sums)), sums)
    mean, inv_norm = column_scale(sums[:, 0], sums[:, 1], perp.rows)
    products = ops.pair_products(start, row, z, *by_row, inv_norm, pairs.gram, pairs.shared)
    return z.new_tensor(ops.pair_slopes(start, z, mean, inv_norm, products)), products


def _add_concept_gradient(
    perp: Orthogonality,
    by_row: tuple[Tensor, ...],
    z: Tensor,
    place: Tensor,
    mean: Tensor,
    inv_norm: Tensor,
    packed: Tensor,
) -> Tensor:
    """Add this bank's part of d perp / d z_concept to `perp.grad_concept`; uses up `packed`; returns this bank's part of perp."""
    q, shift = ops.weigh(packed, mean, inv_norm)
    ops.add_concept_gradient(
        *by_row, z, place, packed, shift, q, perp.concept.contiguous(), perp.inv_norm, perp.grad_concept
    )
    return q.sum()
