"""The normalisation of a data set, computed while its rows pass by, and which rows it leaves out.

A handful of tokens with giant norms would own mean and scale. Rows are therefore summed up by their norms too, and
those whose norm is more than a multiple of the median norm are left out in the end. Shapes: n rows, D width.
"""

import logging
import math

import numpy as np

from trainer.errors import UserError

log = logging.getLogger(__name__)

MAX_NORM = 10.0  # multiples of the median norm
_BINS_PER_OCTAVE = 16  # norms are told apart to 4.4%
_LEAST = 2.0**-160  # below every norm of a row that is not 0


class RunningNormalisation:
    """Mean [D] and mean squared distance from it, float64, merged block by block (Chan, Golub, LeVeque 1979).

    max_norm: rows with a norm above this many times the median norm are left out; 0: none are. Where none is, mean and
    scale are those of all rows to the last bit.
    """

    def __init__(self, width: int, max_norm: float = MAX_NORM):
        self.rows = 0
        self.width, self.mean = width, np.zeros(width)
        self.squares = 0.0  # sum over rows of ||h - mean||^2
        self.max_norm = max_norm
        self._bins: dict[int, tuple[int, np.ndarray, float]] = {}  # by log norm: rows, sums of h [D] and of ||h||^2

    def add(self, rows: np.ndarray) -> None:
        """rows: [n, D] of any float dtype."""
        block = rows.astype(np.float64)
        self._add_by_norm(block)
        mean = block.mean(axis=0)
        block -= mean
        self.merge(len(block), mean, float(np.vdot(block, block)))

    def merge(self, rows: int, mean: np.ndarray, squares: float) -> None:
        """More rows, by their number, their mean [D] and their sum of ||h - mean||^2."""
        delta = mean - self.mean
        total = self.rows + rows
        self.squares += squares + float(delta @ delta) * self.rows * rows / total
        self.mean += delta * (rows / total)
        self.rows = total

    def _add_by_norm(self, block: np.ndarray) -> None:
        squares = np.einsum("nd,nd->n", block, block)
        numbers = np.floor(0.5 * _BINS_PER_OCTAVE * np.log2(np.maximum(squares, _LEAST**2))).astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        found, first = np.unique(numbers[order], return_index=True)
        sums, of_squares = np.add.reduceat(block[order], first), np.add.reduceat(squares[order], first)
        counts = np.diff([*first, len(block)])
        for number, count, total, square in zip(found.tolist(), counts.tolist(), sums, of_squares, strict=True):
            had, theirs, before = self._bins.get(number, (0, np.zeros(self.width), 0.0))
            self._bins[number] = had + count, theirs + total, before + float(square)

    @property
    def median_norm(self) -> float | None:
        """The median norm of the rows, to the width of a bin; None where it is 0 or nothing asks for it."""
        if not self.max_norm or not self.rows:
            return None
        left = self.rows / 2
        for number in sorted(self._bins):
            count = self._bins[number][0]
            if left <= count:
                norm = 2.0 ** ((number + left / count) / _BINS_PER_OCTAVE)
                return norm if norm > 2 * _LEAST else None
            left -= count
        return None

    def result(self, where: str) -> tuple[list[float], float]:
        """(mean, scale) with scale^2 the mean of ||h - mean||^2 over the rows that are not left out; raises UserError
        when all of these are equal."""
        mean, squares, rows = self.mean, self.squares, self.rows
        median = self.median_norm
        if median is not None:
            limit = self.max_norm * median
            kept = [found for number, found in self._bins.items() if 2.0 ** (number / _BINS_PER_OCTAVE) <= limit]
            rows = sum(count for count, _, _ in kept)
            if rows < self.rows:
                mean = sum((total for _, total, _ in kept), np.zeros(self.width)) / rows
                squares = max(sum(square for _, _, square in kept) - rows * float(mean @ mean), 0.0)
                log.warning(
                    "%s: %d of %d rows have norms above %g times the median norm %.4g; mean and scale leave them out",
                    where, self.rows - rows, self.rows, self.max_norm, median,
                )  # fmt: skip
        scale = math.sqrt(squares / rows)
        if not scale > 0:
            raise UserError(f"{where}: all {rows} activation rows are equal, there is nothing to train on")
        return mean.tolist(), scale
