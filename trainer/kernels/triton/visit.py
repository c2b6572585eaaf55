"""All banks of a call on their active entries: how the kernels of search.py, terms.py and correlations.py follow
each other.

The step is that of trainer/kernels/sparse.py, and asks nothing of the host where `context.room` says how many entries
there is room for.

Shapes: B rows, D width, R concepts, places as in table.py, C room for entries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.kernels.gradients import note_squares
from trainer.kernels.interface import BankStats, Result, StepContext
from trainer.kernels.triton import search, terms
from trainer.kernels.triton.correlations import Correlations, Entries
from trainer.kernels.triton.launching import block, launch_encoder, warps
from trainer.kernels.triton.table import Table

ERROR = 2.0**-8  # of a product in bf16 or tf32, relative
WORD = 32
# Entries that a program of a slot or row looks at together; fewer where it has thresholds to train, for its registers.
TOGETHER, FEWER, LINKED = 4, 2, 128
MOST_KEPT = 1 << 23  # correlations that are kept for the backward pass: 32 MiB


def triton_kernel(banks: Sequence[BankWeights], recon: Tensor, context: StepContext) -> Result:
    """All banks on their active entries; see trainer/kernels/interface.py for shapes and duties."""
    weights = [tensor for bank in banks for tensor in (bank.W_enc, bank.b_enc, bank.W_dec)]
    if banks[0].bandwidth:
        weights += [bank.threshold for bank in banks if bank.threshold is not None]
    recon, sp, perp, pull = _Triton.apply(recon, context, banks, *weights)
    return recon, sp, context.zero if perp is None else perp, context.zero if pull is None else pull


def _row_sum(context: StepContext) -> Tensor:
    return context.x.sum(dim=0)


def _row_norm(context: StepContext) -> Tensor:
    """The largest norm of a row of x, [1]."""
    return context.row_norms.amax(dim=0, keepdim=True) if len(context.x) else context.x.new_zeros(1)


def find(table: Table, context: StepContext, window: float) -> Entries:
    """The entries of all banks of the table, those that lie so far below their thresholds too."""
    x, operand = context.x.contiguous(), context.operand.contiguous()
    (B, D), places, device = x.shape, table.places, x.device
    encoder = torch.empty(places, D, dtype=operand.dtype, device=device)
    bound = torch.empty(places, device=device)
    size = block(D)
    banks, n = table.banks, table.slots
    row_norm = context.once(_row_norm)
    search.prepare[(places,)](
        table.fields, row_norm, encoder, bound, window, banks, n, D, BD=size, ERROR=ERROR, num_warps=warps(size)
    )
    row_words, slot_words = -(-B // WORD), -(-places // WORD)
    by_slot = torch.empty(places, row_words, dtype=torch.int32, device=device)
    by_row = torch.empty(B, slot_words, dtype=torch.int32, device=device)
    if B:
        launch_encoder(operand, encoder, bound, by_slot, by_row, (B, places, D, row_words, slot_words))
    counts = torch.empty(places + B + 1, dtype=torch.int32, device=device)
    words = places, row_words, slot_words
    together = min(256, block(max(row_words, slot_words)))
    search.count[(places + B,)](by_slot, by_row, counts, *words, BW=together, num_warps=1)
    starts = counts.cumsum(0)
    start, row_start = starts[: places + 1], starts[places:]
    room = context.room_for(start[-1])
    row, place = (torch.empty(room, dtype=torch.int32, device=device) for _ in range(2))
    z, z_of_row = (torch.empty(room, device=device) for _ in range(2))
    active, fired = (torch.empty(places, dtype=dtype, device=device) for dtype in (torch.int32, torch.bool))
    search.spread_out[(places + B,)](by_slot, by_row, starts, row, place, *words, room, BW=together, num_warps=1)
    search.again[(places,)](
        table.fields,
        x,
        start,
        row,
        z,
        active,
        fired,
        window,
        banks,
        n,
        D,
        room,
        BD=size,
        BE=TOGETHER,
        num_warps=warps(size),
    )
    if B:
        search.link[(B,)](start, row, z, row_start, place, z_of_row, room, BE=LINKED, num_warps=4)
    return Entries(start, row, z, row_start, place, z_of_row, active, fired)


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recon: Tensor, context: StepContext, banks: Sequence[BankWeights], *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        table = Table.of(banks)
        entries = find(table, context, banks[0].bandwidth / 2)
        B, D = recon.shape
        size = block(D)
        out, sparsity = torch.empty_like(recon, memory_format=torch.contiguous_format), recon.new_empty(B)
        if B:
            terms.decode[(B,)](
                table.fields,
                recon,
                out,
                sparsity,
                entries.row_start,
                entries.place,
                entries.z_of_row,
                table.banks,
                table.slots,
                D,
                entries.room,
                *recon.stride(),
                UNIT=banks[0].decoder_norm == "unit",
                JUMP=banks[0].bandwidth > 0,
                BD=size,
                num_warps=warps(size),
            )
        fired = table.each(entries.fired)
        active = entries.active.view(table.banks, table.slots).sum(dim=1)
        stats = [BankStats(part, number) for part, number in zip(fired, active.unbind(), strict=True)]
        context.stats.extend(stats)
        value = ctx.found = None
        if context.perp is not None:
            found = Correlations.of(table, entries, context.perp)
            for bank, squares in zip(stats, table.each(found.squares), strict=True):
                bank.squares = squares
            shift, q, value = found.sums().split([R := context.perp.concept.shape[1], R, 1])
            found.add_concept_gradient(entries, context.perp, shift, q)
            value = value.view(())
            ctx.found = found if found.corr.numel() <= MOST_KEPT else None
        pull = ctx.distance = None
        if banks[0].dead is not None:
            ctx.distance, pull = _pull(table, entries, context)
        ctx.save_for_backward(*weights)
        ctx.table, ctx.entries, ctx.context = table, entries, context
        return out, sparsity.sum(), value, pull

    @staticmethod
    def backward(
        ctx: Any, g_recon: Tensor, g_sp: Tensor, g_perp: Tensor | None, g_pull: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises where a weight was changed meanwhile
        table: Table = ctx.table
        entries: Entries = ctx.entries
        context: StepContext = ctx.context
        x, places, D = context.x, table.places, table.width
        grad_enc, grad_dec = x.new_empty(places, D), x.new_empty(places, D)
        grad_b, norms = x.new_empty(places), x.new_empty(3, places)
        perp = context.perp
        # Again where there are many: kept, the correlations would be the R x S block that nobody may hold.
        found = ctx.found
        if found is None and perp is not None:
            found = Correlations.of(table, entries, perp)
        concepts = 0 if perp is None else perp.concept.shape[1]
        blocks = block(D), block(concepts)
        unread = grad_b  # stands for what is not read
        bandwidth, distance = table.kept[0].bandwidth, ctx.distance
        grad_threshold = torch.empty_like(grad_b) if bandwidth else unread
        terms.gradients[(places,)](
            table.fields,
            context.operand.contiguous(),
            g_recon.to(context.operand.dtype).contiguous(),
            entries.start,
            entries.row,
            entries.z,
            g_sp,
            unread if g_perp is None else g_perp,
            unread if perp is None else perp.concept.contiguous(),
            *(unread for _ in range(5)) if found is None else vars(found).values(),
            grad_enc,
            grad_b,
            grad_dec,
            grad_threshold,
            norms,
            *((unread,) * 3 if distance is None else (g_pull, context.once(_row_sum), distance)),
            bandwidth / 2,
            len(x),
            table.banks,
            table.slots,
            D,
            concepts,
            entries.room,
            UNIT=table.kept[0].decoder_norm == "unit",
            PERP=found is not None,
            JUMP=bandwidth > 0,
            PULL=distance is not None,
            BD=blocks[0],
            BR=blocks[1],
            BE=FEWER if bandwidth else TOGETHER,
            num_warps=warps(sum(blocks)),
        )
        pieces = [table.each(flat) for flat in (grad_enc, grad_b, grad_dec)]
        note_squares(pieces, norms)
        gradients = [gradient for bank in zip(*pieces, strict=True) for gradient in bank]
        return g_recon, None, None, *gradients, *(table.each(grad_threshold) if bandwidth else ())


def _pull(table: Table, entries: Entries, context: StepContext) -> tuple[Tensor, Tensor]:
    """The term `pull`: the distance of each slot [places], and the sum of all times norms of decoder rows."""
    x, size = context.x.contiguous(), block(table.width)
    distance, priced = x.new_empty(table.places), x.new_empty(table.places)
    terms.pull_distance[(table.places,)](
        table.fields,
        x,
        context.once(_row_sum),
        entries.start,
        entries.row,
        entries.z,
        distance,
        priced,
        len(x),
        table.banks,
        table.slots,
        table.width,
        entries.room,
        UNIT=table.kept[0].decoder_norm == "unit",
        BD=size,
        num_warps=warps(size),
    )
    return distance, priced.sum()
