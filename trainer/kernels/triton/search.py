"""Where a code is not zero: one product over all banks, and from it the active entries by slot and by row.

The product only says where to look. What it does not rule out becomes a bit, in one matrix of bits by slot and one by
row, so that entries come out in order without a sort, and room for them is all that has to be guessed. Their
pre-activations are then computed again in fp32.

Shapes: B rows, D width, places as in table.py, C room for entries, W words of 32 bits.
"""

import triton
import triton.language as tl

from trainer.kernels.triton.table import B_ENC, DEAD, SLOTS, STRIDE, THRESHOLD, W_ENC


@triton.jit
def address(table, banks, field, bank):
    """What a bank's field points to: fp32, aligned as torch allocates."""
    return tl.multiple_of(tl.load(table + field * banks + bank).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def optional(table, banks, field, bank, slot, otherwise):
    """Of one slot the number that a field points to; `otherwise` where its bank has none."""
    there = tl.load(table + field * banks + bank)
    readable = tl.where(there != 0, there, tl.load(table + B_ENC * banks + bank))
    return tl.where(there != 0, tl.load(readable.to(tl.pointer_type(tl.float32)) + slot), otherwise)


@triton.jit
def dead(table, banks, bank, slot):
    """Whether the term `pull` counts a slot."""
    there = tl.load(table + DEAD * banks + bank)
    readable = tl.where(there != 0, there + slot, tl.load(table + B_ENC * banks + bank))
    flag = tl.load(readable.to(tl.pointer_type(tl.int8)))
    return tl.where(there != 0, flag, 0) != 0


@triton.jit
def located(table, banks, n, place):
    """Bank of a place, its slot, and whether there is one; of an empty place slot 0."""
    bank, slot = place // n, place % n
    inside = slot < tl.load(table + SLOTS * banks + bank)
    return bank, tl.where(inside, slot, 0), inside


@triton.jit
def encoder_of(table, banks, bank, slot, width, D):
    """Encoder row [BD], bias and threshold of one slot."""
    row = tl.load(address(table, banks, W_ENC, bank) + slot * D + width, mask=width < D, other=0.0)
    bias = tl.load(address(table, banks, B_ENC, bank) + slot)
    stride = tl.load(table + STRIDE * banks + bank)
    return row, bias, optional(table, banks, THRESHOLD, bank, slot * stride, 0.0)


@triton.jit
def _ones(word):
    """Bits that are set in each word of 32 bits."""
    bits = word.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def prepare(table, row_norm, W, bound, window, banks, n, D, BD: tl.constexpr, ERROR: tl.constexpr):
    """One slot: its encoder row in the dtype of the product, and what a product must be above to be looked at.

    W [places, D]; bound [places]; row_norm: the largest norm of a row, one number. window: below thresholds, in which
    entries are looked at too.
    """
    place = tl.program_id(0).to(tl.int64)
    bank, slot, inside = located(table, banks, n, place)
    width = tl.arange(0, BD)
    row, bias, theta = encoder_of(table, banks, bank, slot, width, D)
    tl.store(W + place * D + width, row.to(W.dtype.element_ty), mask=width < D)
    # A product off by its arithmetic's rounding must not lose an entry; the margin is that of product.h.
    spread = 2 * tl.load(row_norm) * tl.sqrt(tl.sum(row * row, axis=0) / D)
    lenient = bias - theta + window + ERROR * (tl.abs(bias) + tl.abs(theta) + spread)
    tl.store(bound + place, tl.where(inside, -lenient, float("inf")))


@triton.jit
def encode(
    x,
    W,
    bound,
    by_slot,
    by_row,
    B,
    places,
    D,
    row_words,
    slot_words,
    BS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Bits of the entries whose product x W^T is not ruled out: by_slot [places, row_words], by_row [B, slot_words].

    Programs take tiles until none is left; those of one group of slots come one after the other, so that their weights
    stay in the cache.
    """
    tall, wide = tl.cdiv(places, BS), tl.cdiv(B, BR)
    for tile in range(tl.program_id(0), tall * wide, tl.num_programs(0)):
        group = tile // (GROUP * wide)
        height = tl.minimum(tall - group * GROUP, GROUP)
        within = tile - group * GROUP * wide
        slots = (group * GROUP + within % height) * BS + tl.arange(0, BS)
        rows = (within // height) * BR + tl.arange(0, BR)
        width = tl.arange(0, BD)
        left = W + slots[:, None].to(tl.int64) * D + width[None, :]
        right = x + rows[None, :].to(tl.int64) * D + width[:, None]
        total = tl.zeros((BS, BR), dtype=tl.float32)
        for d in range(0, D, BD):
            w = tl.load(left + d, mask=(slots[:, None] < places) & (width[None, :] < D - d), other=0.0)
            a = tl.load(right + d, mask=(rows[None, :] < B) & (width[:, None] < D - d), other=0.0)
            total = tl.dot(w, a, total)
        low = tl.load(bound + slots, mask=slots < places, other=float("inf"))[:, None]
        # Not "above": what is not a number has to reach the loss. An empty place is above everything.
        look = tl.where(total <= low, 0, 1) * ((low < float("inf")) | (low != low)).to(tl.int32)
        look = tl.where(rows[None, :] < B, look, 0)
        word = tl.sum(tl.reshape(look << (rows % 32)[None, :], (BS, BR // 32, 32)), axis=2)
        first = (within // height) * (BR // 32) + tl.arange(0, BR // 32)
        tl.store(
            by_slot + slots[:, None].to(tl.int64) * row_words + first[None, :],
            word,
            mask=(slots[:, None] < places) & (first[None, :] < row_words),
        )
        word = tl.sum(tl.reshape(look << (slots % 32)[:, None], (BS // 32, 32, BR)), axis=1)
        first = (group * GROUP + within % height) * (BS // 32) + tl.arange(0, BS // 32)
        tl.store(
            by_row + rows[None, :].to(tl.int64) * slot_words + first[:, None],
            word,
            mask=(rows[None, :] < B) & (first[:, None] < slot_words),
        )


@triton.jit
def _list_of(i, by_slot, by_row, places, row_words, slot_words):
    """Where the words of list i begin, and how many they are: lists are the slots and behind them the rows."""
    is_slot = i < places
    words = tl.where(is_slot, row_words, slot_words)
    return tl.where(is_slot, by_slot + i * row_words, by_row + (i - places) * slot_words), words


@triton.jit
def count(by_slot, by_row, counts, places, row_words, slot_words, BW: tl.constexpr):
    """counts[i + 1]: bits set in list i, counts[0] = 0."""
    i = tl.program_id(0).to(tl.int64)
    bits, words = _list_of(i, by_slot, by_row, places, row_words, slot_words)
    lane = tl.arange(0, BW)
    total = tl.zeros((BW,), dtype=tl.int32)
    for w in range(0, words, BW):
        total += _ones(tl.load(bits + w + lane, mask=w + lane < words, other=0))
    tl.store(counts + i + 1, tl.sum(total, axis=0))
    if i == 0:
        tl.store(counts, 0)


@triton.jit
def spread_out(by_slot, by_row, start, row, place, places, row_words, slot_words, capacity, BW: tl.constexpr):
    """The numbers of the bits set in each list, ascending: of slot i at row[start[i]] and on, of row b at
    place[start[places + b] - start[places]] and on."""
    i = tl.program_id(0).to(tl.int64)
    bits, words = _list_of(i, by_slot, by_row, places, row_words, slot_words)
    out = tl.where(i < places, row, place)
    lane = tl.arange(0, BW)
    first = tl.load(start + i) - tl.where(i < places, 0, tl.load(start + places))
    for w in range(0, words, BW):
        word = tl.load(bits + w + lane, mask=w + lane < words, other=0)
        ones = _ones(word)
        spot = first + tl.cumsum(ones, axis=0) - ones
        while tl.max(tl.where(word != 0, 1, 0), axis=0) > 0:
            lowest = word & (-word)
            tl.store(out + spot, (w + lane) * 32 + _ones(lowest - 1), mask=(word != 0) & (spot < capacity))
            spot += 1
            word = word ^ lowest
        first += tl.sum(ones, axis=0)


@triton.jit
def again(table, x, start, row, z, active, fired, window, banks, n, D, capacity, BD: tl.constexpr, BE: tl.constexpr):
    """One slot: pre-activations z [C] of its entries in fp32, how many are above the threshold, active [places],
    and whether any is, fired [places].

    An entry that is not gets z = 0, and unless it is in the window its row b becomes -1 - b: nothing counts it.
    """
    place = tl.program_id(0).to(tl.int64)
    bank, slot, _ = located(table, banks, n, place)
    width = tl.arange(0, BD)
    weight, bias, theta = encoder_of(table, banks, bank, slot, width, D)
    found = tl.zeros((BE,), dtype=tl.int32)
    last = tl.minimum(tl.load(start + place + 1), capacity)
    for first in range(tl.load(start + place), last, BE):
        e = first + tl.arange(0, BE)
        b = tl.load(row + e, mask=e < last, other=0)
        values = tl.load(
            x + b[:, None].to(tl.int64) * D + width[None, :],
            mask=(e < last)[:, None] & (width < D)[None, :],
            other=0.0,
        )
        pre = tl.sum(values * weight[None, :], axis=1) + bias
        above = tl.where(pre <= theta, 0, 1)
        tl.store(z + e, tl.where(above != 0, pre, 0.0), mask=e < last)
        near = tl.where(pre <= theta - window, 0, 1)
        tl.store(row + e, tl.where(near != 0, b, -1 - b), mask=e < last)
        found += tl.where(e < last, above, 0)
    total = tl.sum(found, axis=0)
    tl.store(active + place, total)
    tl.store(fired + place, total > 0)


@triton.jit
def link(start, row, z, row_start, place, z_of_row, capacity, BE: tl.constexpr):
    """One row: z_of_row [C], the z of its entries in the order of `place` [C], found among those of the slot.

    row_start [B + 1]: where the entries of each row begin, counted from row_start[0].
    """
    b = tl.program_id(0)
    before = tl.load(row_start)
    last = tl.minimum(tl.load(row_start + b + 1) - before, capacity)
    for first in range(tl.load(row_start + b) - before, last, BE):
        e = first + tl.arange(0, BE)
        p = tl.load(place + e, mask=e < last, other=0)
        low = tl.minimum(tl.load(start + p), capacity - 1)
        high = tl.minimum(tl.load(start + p + 1), capacity)
        while tl.max(high - low, axis=0) > 1:
            middle = (low + high) // 2
            there = tl.load(row + middle, mask=middle < capacity, other=0)
            there = tl.where(there < 0, -1 - there, there)
            low = tl.where((there <= b) & (high - low > 1), middle, low)
            high = tl.where((there > b) & (high - low > 1), middle, high)
        tl.store(z_of_row + e, tl.load(z + low), mask=e < last)
