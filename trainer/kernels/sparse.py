"""The sparse kernel for CPU: one encoder product, and everything else on the active entries.

Where z is 0 so is its gradient in every term, so an exact step needs one dense product. Its arithmetic may be bf16 or
int16: it only says where to look; the pre-activations that count are computed again in fp32
(trainer/kernels/encode.cpp). What is kept for backward is O(active).

A threshold that is trained needs the entries in the window below it too. They are entries like the others, with a code
of 0.

Shapes: B rows, D width, R concepts, n slots of the bank, E active entries, m columns (slots active on some data rank).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.kernels.gradients import gradient_buffer, note_square
from trainer.kernels.interface import BankStats, Orthogonality, StepContext, column_scale
from trainer.kernels.pairs import RowPairs
from trainer.kernels.pull import Pull

ops = torch.ops.alignsae
# Rows in a block of the encoder product, where it is fastest: bf16 on AVX-512, fp32 and int16 on AVX2.
BLOCK_ROWS = {torch.bfloat16: 64, torch.float32: 32, torch.int16: 16}


def sparse_kernel(weights: BankWeights, recon: Tensor, context: StepContext) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One bank on its active entries; see trainer/kernels/interface.py for shapes and duties."""
    W_enc, b_enc, W_dec, threshold, *_ = weights
    return _Sparse.apply(W_enc, b_enc, W_dec, threshold, recon, context, weights)


class Entries(NamedTuple):
    """The entries of a bank above their thresholds, slot by slot: those of slot j are start[j] .. start[j + 1]; where
    thresholds are trained also those in the window below, whose z is 0."""

    start: Tensor  # [n + 1] int64
    row: Tensor  # [E] int32
    z: Tensor  # [E] fp32

    def active(self) -> Tensor:
        """Number of active entries of each slot [n], where no code of an active entry is 0."""
        return torch.cat([self.start[:1], (self.z != 0).cumsum(0)])[self.start].diff()

    def slots(self) -> Tensor:
        """The slot of each entry, [E] int64."""
        return torch.arange(len(self.start) - 1).repeat_interleave(self.start.diff())


class RowEntries(NamedTuple):
    """The same row by row: those of row b are start[b] .. start[b + 1], each at position `entry` in the slot order."""

    start: Tensor  # [B + 1] int64
    slot: Tensor  # [E] int32
    entry: Tensor  # [E] int32


class Columns(NamedTuple):
    """The columns of a bank that may correlate with a concept, and what standardises them."""

    slots: Tensor  # [m] int64
    place: Tensor  # [n] int64, the column of each slot
    mean: Tensor  # [m] fp32
    inv_norm: Tensor  # [m] fp32, 0 for a constant column
    weight: Tensor  # [m] fp32, how much each counts


def find_entries(
    W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, context: StepContext, window: float = 0.0
) -> Entries:
    """Entries (b, j) with x_b . W_enc_j + b_enc_j above threshold [n] (None: 0), in fp32, and their pre-activations;
    with a code of 0 those that lie above threshold - window alone."""
    blocks = context.once(_operand_blocks)
    if threshold is not None:
        threshold = threshold.contiguous()  # one number for all slots comes expanded
    return Entries(*ops.encode(W_enc, b_enc, threshold, window, context.x, blocks, context.max_row_norm))


class _Sparse(torch.autograd.Function):
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
        perp = context.perp
        # Held thresholds need no window.
        window = bank.bandwidth / 2 if ctx.needs_input_grad[3] else 0.0
        entries = find_entries(W_enc, b_enc, threshold, context, window)
        by_row = RowEntries(*ops.by_row(entries, len(context.x)))
        recon, sp = ops.decode(W_dec, recon.contiguous(), entries.z, by_row, decoder_norm == "unit")
        per_slot = entries.start.diff()
        active = entries.active() if window else per_slot
        stats = BankStats(active > 0, active.sum().float())
        context.stats.append(stats)
        if bank.bandwidth:
            sp = float(stats.active)
        value = recon.new_zeros(())
        ctx.columns = ctx.slopes = None
        if perp is not None and perp.pairs is not None and perp.pairs.cheaper(per_slot):
            stats.squares, ctx.slopes = _by_pairs(entries, by_row, perp, perp.pairs, counted)
        elif perp is not None:
            stats.squares, ctx.columns = _by_columns(entries, by_row, perp, counted)
        if stats.squares is not None:
            value = (stats.squares * counted).sum()
        ctx.pull = None
        if bank.dead is not None:
            passed = entries.z != 0
            ctx.pull = Pull.of(bank, context, entries.slots()[passed], entries.row[passed].long())
        ctx.save_for_backward(W_enc, b_enc, W_dec, threshold)
        ctx.entries, ctx.context, ctx.bank = entries, context, bank
        return recon, recon.new_tensor(sp), value, recon.new_zeros(()) if ctx.pull is None else ctx.pull.value()

    @staticmethod
    def backward(ctx: Any, g_recon: Tensor, g_sp: Tensor, g_perp: Tensor, g_pull: Tensor) -> tuple[Tensor | None, ...]:
        context: StepContext = ctx.context
        W_enc, b_enc, W_dec, threshold = ctx.saved_tensors
        bank: BankWeights = ctx.bank
        columns: Columns | None = ctx.columns
        correlation: tuple[Tensor, ...] = ()
        if context.perp is not None and columns is not None:
            # Again: kept for all banks, the sums would be the R x S block that nobody may hold.
            sums = _column_sums(ctx.entries, columns.slots, context.perp)
            correlation = (context.perp.concept.contiguous(), *columns[1:], sums)
        grads = gradient_buffer(W_enc), torch.empty_like(b_enc), gradient_buffer(W_dec), torch.empty_like(b_enc)
        grad_enc, grad_b, grad_dec, grad_threshold = grads
        enc_square, dec_square = ops.backward(
            W_dec,
            context.x,
            g_recon.contiguous(),
            ctx.entries,
            float(g_sp),
            bank.decoder_norm == "unit",
            float(g_perp),
            correlation,
            ctx.slopes,
            threshold.contiguous() if bank.bandwidth else None,
            bank.bandwidth,
            grads,
        )
        if ctx.pull is not None:
            more = ctx.pull.add_gradients(g_pull, grads)
            enc_square, dec_square = enc_square + more[0], dec_square + more[1]
        note_square(grad_enc, enc_square)
        note_square(grad_dec, dec_square)
        return grad_enc, grad_b, grad_dec, grad_threshold if bank.bandwidth else None, g_recon, None, None


def in_blocks(x: Tensor) -> Tensor:
    """Rows [B, D] of fp32, bf16 or int16 as `encode` multiplies with them.

    [blocks, words, rows of a block], where a word is one number of fp32, or two of the others.
    """
    rows, narrow = BLOCK_ROWS[x.dtype], x.element_size() == 2
    count = -(-len(x) // rows)
    words = F.pad(x, (0, x.shape[1] % 2 if narrow else 0, 0, count * rows - len(x)))
    if narrow:
        words = words.view(torch.int32)
    blocks = words.view(count, rows, words.shape[1]).transpose(1, 2)
    return blocks.clone(memory_format=torch.contiguous_format).view(x.dtype)


def in_int16(x: Tensor, max_row_norm: float) -> Tensor:
    """Rows [B, D] of at most this norm as int16 numbers; trainer/kernels/product.h says why in this scale."""
    return (x * (ops.int16_norm() / max_row_norm if max_row_norm > 0 else 0.0)).round().to(torch.int16)


def _operand_blocks(context: StepContext) -> Tensor:
    """The rows in the arithmetic of the encoder product.

    It is bf16 where the run and the CPU have it, else the faster of int16 and fp32.
    """
    if context.x_bf16 is not None and ops.bf16_products():
        return in_blocks(context.x_bf16)
    return in_blocks(in_int16(context.x, context.max_row_norm) if ops.int16_products() else context.x)


def _column_sums(entries: Entries, slots: Tensor, perp: Orthogonality) -> Tensor:
    """[m, R + 2]: sums of z, z^2 and concept^T z of the given slots [m], over the global batch; one reduction."""
    # Room for all slots of the bank, so that every bank of this size finds the same buffer again.
    out = ops.buffer([len(entries.start) - 1, perp.concept.shape[1] + 2])[: len(slots)]
    ops.column_sums(entries, perp.concept.contiguous(), slots, out)
    return perp.reduce(out)


def _by_columns(entries: Entries, by_row: RowEntries, perp: Orthogonality, counted: Tensor) -> tuple[Tensor, Columns]:
    """Squared correlations of each slot [n] by those of the columns; adds to `perp.grad_concept`."""
    anywhere = perp.reduce((entries.start.diff() > 0).float()) > 0
    slots, place = anywhere.nonzero()[:, 0], anywhere.cumsum(0) - 1
    sums = _column_sums(entries, slots, perp)
    mean, inv_norm = column_scale(sums[:, 0], sums[:, 1], perp.rows)
    columns = Columns(slots, place, mean, inv_norm, counted[slots])
    q, shift, of_columns = ops.weigh(sums, mean, inv_norm, columns.weight)
    concept = perp.concept.contiguous()
    ops.add_concept_gradient(by_row, entries.z, place, sums, shift, q, concept, perp.inv_norm, perp.grad_concept)
    return torch.zeros_like(counted).index_copy_(0, slots, of_columns), columns


def _by_pairs(
    entries: Entries, by_row: RowEntries, perp: Orthogonality, pairs: RowPairs, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared correlations of each slot [n], and the gradient [E] with respect to z; adds to `pairs.shared`."""
    z = entries.z
    sums = z.new_empty(len(entries.start) - 1, 2)
    ops.column_sums(entries, z.new_empty(len(pairs.gram), 0), torch.arange(len(sums)), sums)
    mean, inv_norm = column_scale(sums[:, 0], sums[:, 1], perp.rows)
    products = ops.pair_products(entries, by_row, inv_norm, counted, pairs.gram, pairs.shared)
    return ops.pair_slopes(entries, mean, inv_norm, counted, products), products
