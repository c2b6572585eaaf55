"""Correlations of free slots with the concept slots, from active entries: sums over columns, and what they lead to.

Shapes: B rows, R concepts, places as in table.py, C room for entries; entries as in terms.py.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from trainer import losses
from trainer.kernels.interface import Orthogonality
from trainer.kernels.triton.launching import block, side_by_side, warps
from trainer.kernels.triton.search import located, optional
from trainer.kernels.triton.table import COUNTED, Table

CONSTANT_SHARE = tl.constexpr(losses.CONSTANT_SHARE)
SUMMING = 256  # programs that share the sums over slots


@triton.jit
def column_sums(start, row, z, concept, out, R, capacity, BR: tl.constexpr, BE: tl.constexpr):
    """One slot: out [places, R + 2], the sums over its entries of z, z^2 and z times the concept code of the row."""
    place = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BR)
    total = tl.zeros((BE,), dtype=tl.float32)
    square = tl.zeros((BE,), dtype=tl.float32)
    cross = tl.zeros((BR,), dtype=tl.float32)
    last = tl.minimum(tl.load(start + place + 1), capacity)
    for first in range(tl.load(start + place), last, BE):
        e = first + tl.arange(0, BE)
        b = tl.load(row + e, mask=e < last, other=-1)
        value = tl.where(b >= 0, tl.load(z + e, mask=e < last, other=0.0), 0.0)
        code = tl.load(
            concept + b[:, None].to(tl.int64) * R + r[None, :], mask=(b >= 0)[:, None] & (r < R)[None, :], other=0.0
        )
        total += value
        square += value * value
        cross += tl.sum(value[:, None] * code, axis=0)
    tl.store(out + place * (R + 2), tl.sum(total, axis=0))
    tl.store(out + place * (R + 2) + 1, tl.sum(square, axis=0))
    tl.store(out + place * (R + 2) + 2 + r, cross, mask=r < R)


@triton.jit
def correlate(
    table,
    sums,
    rows,
    corr,
    mean,
    gain,
    squares,
    counted,
    banks,
    n,
    R,
    BR: tl.constexpr,
):
    """One slot, from the sums of the global batch: its correlations corr [places, R] and their squares' sum [places].

    mean [places] of z; counted [places]: how much the slot counts; gain [places]: that over the norm of the centred
    column, 0 for a constant one. rows: G, one number.
    """
    place = tl.program_id(0).to(tl.int64)
    bank, slot, inside = located(table, banks, n, place)
    r = tl.arange(0, BR)
    total = tl.load(sums + place * (R + 2))
    square = tl.load(sums + place * (R + 2) + 1)
    cross = tl.load(sums + place * (R + 2) + 2 + r, mask=r < R, other=0.0)
    G = tl.load(rows)
    # In double: the difference of two large sums is what a correlation divides by.
    centred = square.to(tl.float64) - total.to(tl.float64) * total.to(tl.float64) / G.to(tl.float64)
    constant = centred <= CONSTANT_SHARE * square.to(tl.float64)
    inverse = tl.where(constant, 0.0, 1.0 / tl.sqrt(tl.maximum(centred, 1e-38))).to(tl.float32)
    correlation = cross * inverse
    weight = tl.where(inside, optional(table, banks, COUNTED, bank, slot, 1.0), 0.0)
    tl.store(corr + place * R + r, correlation, mask=r < R)
    tl.store(mean + place, total / G)
    tl.store(gain + place, inverse * weight)
    tl.store(squares + place, tl.sum(correlation * correlation, axis=0))
    tl.store(counted + place, weight)


@triton.jit
def weighted_sums(corr, mean, gain, squares, counted, out, places, R, each, BR: tl.constexpr, BE: tl.constexpr):
    """`each` slots: out [programs, 2 R + 1], the sums over them of gain mean corr, of counted corr^2 and of counted
    squares."""
    program = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BR)
    shift = tl.zeros((BR,), dtype=tl.float32)
    q = tl.zeros((BR,), dtype=tl.float32)
    value = tl.zeros((BE,), dtype=tl.float32)
    last = tl.minimum((program + 1) * each, places)
    for first in range(program * each, last, BE):
        p = first + tl.arange(0, BE)
        columns = tl.load(
            corr + p[:, None].to(tl.int64) * R + r[None, :], mask=(p < last)[:, None] & (r < R)[None, :], other=0.0
        )
        weight = tl.load(counted + p, mask=p < last, other=0.0)
        drift = tl.load(gain + p, mask=p < last, other=0.0) * tl.load(mean + p, mask=p < last, other=0.0)
        shift += tl.sum(drift[:, None] * columns, axis=0)
        q += tl.sum(weight[:, None] * columns * columns, axis=0)
        value += weight * tl.load(squares + p, mask=p < last, other=0.0)
    out += program * (2 * R + 1)
    tl.store(out + r, shift, mask=r < R)
    tl.store(out + R + r, q, mask=r < R)
    tl.store(out + 2 * R, tl.sum(value, axis=0))


@triton.jit
def concept_gradient(
    row_start, place, z, corr, gain, shift, q, concept, inverse, out, R, capacity, BR: tl.constexpr, BE: tl.constexpr
):
    """One row b: out[b] += 2 inverse (sum over its entries of z gain_p corr_p - shift - q concept[b]), all [R]."""
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BR)
    total = tl.zeros((BR,), dtype=tl.float32)
    before = tl.load(row_start)
    last = tl.minimum(tl.load(row_start + b + 1) - before, capacity)
    for first in range(tl.load(row_start + b) - before, last, BE):
        e = first + tl.arange(0, BE)
        p = tl.load(place + e, mask=e < last, other=0)
        value = tl.load(z + e, mask=e < last, other=0.0) * tl.load(gain + p)
        columns = tl.load(corr + p[:, None].to(tl.int64) * R + r[None, :], mask=(r < R)[None, :], other=0.0)
        total += tl.sum(value[:, None] * columns, axis=0)
    there = r < R
    own = tl.load(concept + b * R + r, mask=there, other=0.0) * tl.load(q + r, mask=there, other=0.0)
    total = total - tl.load(shift + r, mask=there, other=0.0) - own
    so_far = tl.load(out + b * R + r, mask=there, other=0.0)
    tl.store(out + b * R + r, so_far + 2 * total * tl.load(inverse + r, mask=there, other=0.0), mask=there)


@dataclass
class Entries:
    """Active entries, slot by slot and row by row; see search.py."""

    start: Tensor  # [places + 1]
    row: Tensor  # [C] int32, -1 - row where it is not active
    z: Tensor  # [C], 0 in the window below a threshold that is trained
    row_start: Tensor  # [B + 1], counted from its first
    place: Tensor  # [C] int32, row by row
    z_of_row: Tensor  # [C]
    active: Tensor  # [places] int32
    fired: Tensor  # [places] bool

    @property
    def room(self) -> int:
        """C."""
        return len(self.z)


@dataclass
class Correlations:
    """What correlate found: corr [places, R], the others [places]."""

    corr: Tensor
    mean: Tensor
    gain: Tensor
    squares: Tensor
    counted: Tensor

    @classmethod
    def of(cls, table: Table, entries: Entries, perp: Orthogonality) -> "Correlations":
        """Over the global batch; one reduction over data ranks."""
        R = perp.concept.shape[1]
        size = block(R)
        sums = entries.z.new_empty(table.places, R + 2)
        column_sums[(table.places,)](
            entries.start,
            entries.row,
            entries.z,
            perp.concept.contiguous(),
            sums,
            R,
            entries.room,
            BR=size,
            BE=side_by_side(size),
            num_warps=warps(size),
        )
        sums = perp.reduce(sums)
        found = cls(sums.new_empty(table.places, R), *(sums.new_empty(table.places) for _ in range(4)))
        correlate[(table.places,)](
            table.fields,
            sums,
            perp.rows,
            found.corr,
            found.mean,
            found.gain,
            found.squares,
            found.counted,
            table.banks,
            table.slots,
            R,
            BR=size,
            num_warps=warps(size),
        )
        return found

    def sums(self) -> Tensor:
        """weighted_sums over all slots, [2 R + 1]."""
        places, R = self.corr.shape
        programs, size = min(SUMMING, places), block(R)
        parts = self.corr.new_empty(programs, 2 * R + 1)
        weighted_sums[(programs,)](
            self.corr,
            self.mean,
            self.gain,
            self.squares,
            self.counted,
            parts,
            places,
            R,
            -(-places // programs),
            BR=size,
            BE=side_by_side(size),
            num_warps=warps(size),
        )
        return parts.sum(dim=0)

    def add_concept_gradient(self, entries: Entries, perp: Orthogonality, shift: Tensor, q: Tensor) -> None:
        """Add these banks' part of d perp / d z_concept to `perp.grad_concept`; shift, q [R]: of `sums`."""
        B, R = perp.concept.shape
        if not B:
            return
        size = block(R)
        concept_gradient[(B,)](
            entries.row_start,
            entries.place,
            entries.z_of_row,
            self.corr,
            self.gain,
            shift,
            q,
            perp.concept.contiguous(),
            perp.inv_norm,
            perp.grad_concept,
            R,
            entries.room,
            BR=size,
            BE=side_by_side(size),
            num_warps=warps(size),
        )
