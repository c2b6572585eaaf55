"""What concept slots and losses over rows need, row by row or column by column: one launch where plain PyTorch takes
many. heads.py launches these.

Shapes: B rows, R concepts, A answers, K free slots.
"""

import triton
import triton.language as tl


@triton.jit
def cross_entropy(logits, target, classes, C: tl.constexpr):
    """Of one row: its cross-entropy with a target (0 with one below 0), and the gradient [C]; logits [C], of which
    `classes` are there."""
    c = tl.arange(0, C)
    there = c < classes
    top = tl.max(tl.where(there, logits, float("-inf")), axis=0)
    powers = tl.where(there, tl.exp(logits - top), 0.0)
    total = tl.sum(powers, axis=0)
    own = tl.sum(tl.where(c == target, logits, 0.0), axis=0)
    loss = tl.where(target >= 0, tl.log(total) + top - own, 0.0)
    gradient = tl.where(target >= 0, powers / total - tl.where(c == target, 1.0, 0.0), 0.0)
    return loss, gradient


@triton.jit
def encode_row(product, bias, norm, label, z, operand, slope, figures, R, BR: tl.constexpr, SAME: tl.constexpr):
    """One row: its code (in fp32, and unless SAME as the operand of a product), gradient of its binding
    term, and its figures [4]: binding term, sum of norm times z, active entries, whether its largest logit is its
    label's. product [B, R]: x W_enc^T."""
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BR)
    there = r < R
    own = tl.load(product + b * R + r, mask=there, other=0.0).to(tl.float32) + tl.load(bias + r, mask=there, other=0.0)
    code = tl.where(there & ((own > 0) | (own != own)), own, 0.0)
    target = tl.load(label + b).to(tl.int32)
    loss, gradient = cross_entropy(own, target, R, BR)
    tl.store(z + b * R + r, code, mask=there)
    if not SAME:
        tl.store(operand + b * R + r, code.to(operand.dtype.element_ty), mask=there)
    tl.store(slope + b * R + r, gradient, mask=there)
    tl.store(figures + b * 4, loss)
    tl.store(figures + b * 4 + 1, tl.sum(code * tl.load(norm + r, mask=there, other=0.0), axis=0))
    tl.store(figures + b * 4 + 2, tl.sum(tl.where(there & (code > 0), 1.0, 0.0), axis=0))
    best = tl.argmax(tl.where(there, own, float("-inf")), axis=0)
    tl.store(figures + b * 4 + 3, tl.where(best == target, 1.0, 0.0))


@triton.jit
def encode_row_backward(
    above,
    g_z,
    g_bind,
    g_sp,
    norm,
    slope,
    z,
    g_pre,
    operand,
    R,
    BR: tl.constexpr,
    CODE: tl.constexpr,
    SAME: tl.constexpr,
):
    """One row: gradient of its pre-activations, in fp32 and unless SAME as the operand of a product.

    above [B, R]: gradient of the reconstruction times the decoder; g_z [B, R]: what else reaches the code, read with
    CODE; g_bind, g_sp: one number each, gradients of the sums over rows of the first two figures of `encode_row`.
    """
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BR)
    there = r < R
    total = tl.load(above + b * R + r, mask=there, other=0.0).to(tl.float32)
    if CODE:
        total += tl.load(g_z + b * R + r, mask=there, other=0.0)
    total += tl.load(g_sp) * tl.load(norm + r, mask=there, other=0.0)
    code = tl.load(z + b * R + r, mask=there, other=0.0)
    total = tl.where((code > 0) | (code != code), total, 0.0)
    total += tl.load(g_bind) * tl.load(slope + b * R + r, mask=there, other=0.0)
    tl.store(g_pre + b * R + r, total, mask=there)
    if not SAME:
        tl.store(operand + b * R + r, total.to(operand.dtype.element_ty), mask=there)


@triton.jit
def slot_backward(g_pre, z, g_sp, norm, decoder, grad_b, grad_dec, B, R, D, BB: tl.constexpr, BD: tl.constexpr):
    """One concept slot: gradient of its bias, and what the sparsity term adds to that of its decoder row."""
    r = tl.program_id(0).to(tl.int64)
    slopes = tl.zeros((BB,), dtype=tl.float32)
    codes = tl.zeros((BB,), dtype=tl.float32)
    for first in range(0, B, BB):
        b = first + tl.arange(0, BB).to(tl.int64)
        slopes += tl.load(g_pre + b * R + r, mask=b < B, other=0.0)
        codes += tl.load(z + b * R + r, mask=b < B, other=0.0)
    tl.store(grad_b + r, tl.sum(slopes, axis=0))
    length = tl.load(norm + r)
    factor = tl.where(length > 0, tl.load(g_sp) * tl.sum(codes, axis=0) / length, 0.0)
    width = tl.arange(0, BD)
    place = r * D + width
    before = tl.load(grad_dec + place, mask=width < D, other=0.0)
    tl.store(grad_dec + place, before + factor * tl.load(decoder + place, mask=width < D, other=0.0), mask=width < D)


@triton.jit
def answer_row(logits, answer, loss, slope, A, BA: tl.constexpr):
    """One row: its cross-entropy with an answer (0 with none, below 0), and the gradient of that."""
    b = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, BA)
    own = tl.load(logits + b * A + a, mask=a < A, other=0.0).to(tl.float32)
    value, gradient = cross_entropy(own, tl.load(answer + b).to(tl.int32), A, BA)
    tl.store(loss + b, value)
    tl.store(slope + b * A + a, gradient, mask=a < A)


@triton.jit
def code_totals(z, totals, B, R, BB: tl.constexpr, BC: tl.constexpr):
    """BC concept slots: the sum of z over rows, totals [R]."""
    r = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BB, BC), dtype=tl.float32)
    for first in range(0, B, BB):
        b = first + tl.arange(0, BB)
        total += tl.load(
            z + b[:, None].to(tl.int64) * R + r[None, :], mask=(b < B)[:, None] & (r < R)[None, :], other=0.0
        )
    tl.store(totals + r, tl.sum(total, axis=0), mask=r < R)


@triton.jit
def code_squares(z, totals, rows, squares, B, R, BB: tl.constexpr, BC: tl.constexpr):
    """BC concept slots: squares [2, R], the sums over rows of (z - mean)^2 and z^2. rows: G, one number."""
    r = tl.program_id(0) * BC + tl.arange(0, BC)
    mean = tl.load(totals + r, mask=r < R, other=0.0) / tl.maximum(tl.load(rows), 1.0)
    centred = tl.zeros((BB, BC), dtype=tl.float32)
    plain = tl.zeros((BB, BC), dtype=tl.float32)
    for first in range(0, B, BB):
        b = first + tl.arange(0, BB)
        there = (b < B)[:, None] & (r < R)[None, :]
        value = tl.load(z + b[:, None].to(tl.int64) * R + r[None, :], mask=there, other=0.0)
        shifted = tl.where(there, value - mean[None, :], 0.0)
        centred += shifted * shifted
        plain += value * value
    tl.store(squares + r, tl.sum(centred, axis=0), mask=r < R)
    tl.store(squares + R + r, tl.sum(plain, axis=0), mask=r < R)


@triton.jit
def standardise(
    z, totals, squares, rows, concept, inv_norm, gradient, B, R, SHARE: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr
):
    """BB rows of BC concept slots: the standardised code concept [B, R], inv_norm [R] and behind it G or 1 if that is
    more, and a gradient [B, R] of 0."""
    r = tl.program_id(1) * BC + tl.arange(0, BC)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    G = tl.maximum(tl.load(rows), 1.0)
    mean = tl.load(totals + r, mask=r < R, other=0.0) / G
    centred = tl.load(squares + r, mask=r < R, other=0.0)
    plain = tl.load(squares + R + r, mask=r < R, other=0.0)
    inverse = tl.where(centred <= SHARE * plain, 0.0, 1.0 / tl.sqrt(tl.maximum(centred, 1e-38)))
    there = (b < B)[:, None] & (r < R)[None, :]
    place = b[:, None].to(tl.int64) * R + r[None, :]
    value = tl.load(z + place, mask=there, other=0.0)
    tl.store(concept + place, (value - mean[None, :]) * inverse[None, :], mask=there)
    tl.store(gradient + place, tl.zeros((BB, BC), dtype=tl.float32), mask=there)
    if tl.program_id(0) == 0:
        tl.store(inv_norm + r, inverse, mask=r < R)
        tl.store(inv_norm + R, G)


@triton.jit
def counts_from(dependence, out, K, LOW: tl.constexpr, HIGH: tl.constexpr, BK: tl.constexpr):
    """BK free slots: how much each counts in the orthogonality term; see following.perp_weight."""
    k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    value = (tl.load(dependence + k, mask=k < K, other=0.0) - LOW) / (HIGH - LOW)
    tl.store(out + k, tl.minimum(tl.maximum(value, 0.0), 1.0), mask=k < K)


@triton.jit
def follow(dependence, squares, rows, inv_norm, made, K, R, RATE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    """BK free slots: their dependence after one more step, in place; see following.followed_dependence."""
    k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    r = tl.arange(0, BR)
    concepts = tl.sum(tl.where(tl.load(inv_norm + r, mask=r < R, other=0.0) > 0, 1.0, 0.0), axis=0)
    square = tl.load(squares + k, mask=k < K, other=0.0)
    before = tl.load(dependence + k, mask=k < K, other=0.0)
    ratio = square * ((tl.load(rows) - 1) / tl.maximum(concepts, 1.0))
    counts = (square > 0) & (tl.load(made) != 0)
    tl.store(dependence + k, tl.where(counts, before + RATE * (ratio - before), before), mask=k < K)
