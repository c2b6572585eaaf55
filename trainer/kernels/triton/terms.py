"""What is computed from active entries: the reconstruction row by row, gradients slot by slot.

Shapes: B rows, D width, R concepts, places as in table.py, C room for entries. Entries of place p are start[p] ..
start[p + 1], each with its row and z: -1 - row where it is not active, z = 0 where it is in the window below a
threshold that is trained. Entries of row b are those from row_start[b] to row_start[b + 1], counted from row_start[0].
"""

import triton
import triton.language as tl

from trainer.kernels.triton.search import address, dead, encoder_of, located
from trainer.kernels.triton.table import STRIDE, THRESHOLD, W_DEC

LEAST_NORM = tl.constexpr(1e-12)  # what a decoder norm is divided by at least


@triton.jit
def decode(
    table,
    recon,
    out,
    sparsity,
    row_start,
    place,
    z,
    banks,
    n,
    D,
    capacity,
    row_stride,
    stride,
    UNIT: tl.constexpr,
    JUMP: tl.constexpr,
    BD: tl.constexpr,
):
    """One row b: out[b] = recon[b] + its code times the decoder, and sparsity[b], the sum of ||W_dec_j|| z_bj, or with
    JUMP how many of z_bj are not 0.

    recon lies with these strides, out is contiguous.
    """
    b = tl.program_id(0).to(tl.int64)
    width = tl.arange(0, BD)
    total = tl.load(recon + b * row_stride + width * stride, mask=width < D, other=0.0)
    sparse = 0.0
    before = tl.load(row_start)
    last = tl.minimum(tl.load(row_start + b + 1) - before, capacity)
    for e in range(tl.load(row_start + b) - before, last):
        p = tl.load(place + e)
        value = tl.load(z + e)
        decoder = tl.load(
            address(table, banks, W_DEC, p // n) + (p % n).to(tl.int64) * D + width, mask=width < D, other=0.0
        )
        norm = tl.sqrt(tl.sum(decoder * decoder, axis=0))
        scale = value / tl.maximum(norm, LEAST_NORM) if UNIT else value
        total += scale * decoder
        if JUMP:
            sparse += tl.where(value != 0, 1.0, 0.0)
        else:
            sparse += value if UNIT else value * norm
    tl.store(out + b * D + width, total, mask=width < D)
    tl.store(sparsity + b, sparse)


@triton.jit
def gradients(
    table,
    x,
    g_recon,
    start,
    row,
    z,
    g_sp,
    g_perp,
    concept,
    corr,
    mean,
    gain,
    squares,
    counted,
    grad_enc,
    grad_b,
    grad_dec,
    grad_threshold,
    norms,
    g_pull,
    row_sum,
    distance,
    half,
    B,
    banks,
    n,
    D,
    R,
    capacity,
    UNIT: tl.constexpr,
    PERP: tl.constexpr,
    JUMP: tl.constexpr,
    PULL: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """One slot: its gradients [places, D], [places], [places, D], and the sum of squares of each, norms [3, places].

    x and g_recon [B, D] in the dtype of the products, whose sums are fp32. Without PERP concept .. counted are not
    read.

    With JUMP thresholds are trained by a rectangle kernel of width 2 half: grad_threshold [places] is -1 / (2 half)
    times the sum over entries in it of threshold times slope plus g_sp. With PULL dead slots are pulled: row_sum [D] is
    the sum of all rows, distance [places] what pull_distance found.
    """
    place = tl.program_id(0).to(tl.int64)
    bank, slot, inside = located(table, banks, n, place)
    width = tl.arange(0, BD)
    there = width < D
    decoder = tl.load(address(table, banks, W_DEC, bank) + slot * D + width, mask=there, other=0.0)
    norm = tl.sqrt(tl.sum(decoder * decoder, axis=0))
    safe = tl.maximum(norm, LEAST_NORM)
    up = 0.0 if JUMP else tl.load(g_sp)
    own = 0.0
    if PERP:
        r = tl.arange(0, BR)
        column = tl.load(corr + place * R + r, mask=r < R, other=0.0)
        scale = 2 * tl.load(g_perp) * tl.load(gain + place)
        weight = tl.load(counted + place)
        average = tl.load(mean + place)
        # gain is counted / norm; where a slot does not count its slope is 0 whatever stands here.
        own = tl.where(weight > 0, tl.load(gain + place) / weight, 0.0) * tl.load(squares + place)
    encoder = tl.zeros((BD,), dtype=tl.float32)
    drawn = tl.zeros((BD,), dtype=tl.float32)
    slopes = tl.zeros((BE,), dtype=tl.float32)
    sum_z = tl.zeros((BE,), dtype=tl.float32)
    if JUMP:
        theta = tl.load(address(table, banks, THRESHOLD, bank) + slot * tl.load(table + STRIDE * banks + bank))
        active_price = tl.load(g_sp)
        jumped = tl.zeros((BE,), dtype=tl.float32)
    if PULL:
        pull = tl.where(inside, tl.where(dead(table, banks, bank, slot), tl.load(g_pull), 0.0), 0.0)
        force = pull if UNIT else pull * norm
        count = tl.zeros((BE,), dtype=tl.float32)
    last = tl.minimum(tl.load(start + place + 1), capacity)
    for first in range(tl.load(start + place), last, BE):
        e = first + tl.arange(0, BE)
        b = tl.load(row + e, mask=e < last, other=-1)
        active = b >= 0
        value = tl.where(active, tl.load(z + e, mask=e < last, other=0.0), 0.0)
        mask = active[:, None] & there[None, :]
        above = tl.load(g_recon + b[:, None].to(tl.int64) * D + width[None, :], mask=mask, other=0.0).to(tl.float32)
        slope = tl.sum(above * decoder[None, :], axis=1)
        slope = slope / safe + up if UNIT else slope + up * norm
        if PERP:
            code = tl.load(
                concept + b[:, None].to(tl.int64) * R + r[None, :], mask=active[:, None] & (r < R)[None, :], other=0.0
            )
            slope += scale * (tl.sum(code * column[None, :], axis=1) - (value - average) * own)
        slope = tl.where(active, slope, 0.0)
        if JUMP:
            jumped += tl.where(active & (value < theta + half), theta * slope + active_price, 0.0)
            slope = tl.where(value != 0, slope, 0.0)
        if PULL:  # all rows are pulled (below), but not those on which the slot is active
            fires = tl.where(value != 0, 1.0, 0.0)
            slope += force * fires
            count += fires
        rows = tl.load(x + b[:, None].to(tl.int64) * D + width[None, :], mask=mask, other=0.0).to(tl.float32)
        encoder += tl.sum(slope[:, None] * rows, axis=0)
        drawn += tl.sum(value[:, None] * above, axis=0)
        slopes += slope
        sum_z += value
    if UNIT:  # gradient of a row divided by its norm: what is orthogonal to the row
        unit = decoder / safe
        drawn = (drawn - tl.sum(drawn * unit, axis=0) * unit) / safe
    else:
        drawn += (up * tl.sum(sum_z, axis=0) / safe) * decoder
    slope_sum = tl.sum(slopes, axis=0)
    if PULL:
        encoder -= force * tl.load(row_sum + width, mask=there, other=0.0)
        slope_sum -= force * B
        if not UNIT:
            drawn += (pull * tl.load(distance + place) / safe) * decoder
    if JUMP:
        threshold_sum = -tl.sum(jumped, axis=0) / (2 * half)
        if PULL:
            threshold_sum += force * (B - tl.sum(count, axis=0))
        tl.store(grad_threshold + place, threshold_sum)
    tl.store(grad_enc + place * D + width, encoder, mask=there)
    tl.store(grad_b + place, slope_sum)
    tl.store(grad_dec + place * D + width, drawn, mask=there)
    places = banks * n
    tl.store(norms + place, tl.sum(encoder * encoder, axis=0))
    tl.store(norms + places + place, slope_sum * slope_sum)
    tl.store(norms + 2 * places + place, tl.sum(drawn * drawn, axis=0))


@triton.jit
def pull_distance(
    table, x, row_sum, start, row, z, distance, pull, B, banks, n, D, capacity, UNIT: tl.constexpr, BD: tl.constexpr
):
    """One slot: distance [places], of a dead slot the sum over rows of max(threshold - pre, 0), else 0; and that times
    the norm of the decoder row as it is used, pull [places]. row_sum [D]: the sum of all rows.

    Where it is active the distance is 0, so from the sum over all rows of threshold - pre that of its entries is taken.
    """
    place = tl.program_id(0).to(tl.int64)
    bank, slot, inside = located(table, banks, n, place)
    total, price = 0.0, 0.0
    if dead(table, banks, bank, slot) & inside:
        width = tl.arange(0, BD)
        encoder, bias, theta = encoder_of(table, banks, bank, slot, width, D)
        idle = tl.load(row_sum + width, mask=width < D, other=0.0)
        left = B.to(tl.float32)
        last = tl.minimum(tl.load(start + place + 1), capacity)
        for e in range(tl.load(start + place), last):
            b = tl.load(row + e)
            fires = tl.where(b >= 0, tl.where(tl.load(z + e) != 0, 1.0, 0.0), 0.0)
            idle -= fires * tl.load(x + tl.maximum(b, 0).to(tl.int64) * D + width, mask=width < D, other=0.0)
            left -= fires
        total = left * (theta - bias) - tl.sum(idle * encoder, axis=0)
        decoder = tl.load(address(table, banks, W_DEC, bank) + slot * D + width, mask=width < D, other=0.0)
        price = total if UNIT else total * tl.sqrt(tl.sum(decoder * decoder, axis=0))
    tl.store(distance + place, total)
    tl.store(pull + place, price)
