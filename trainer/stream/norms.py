"""Rows by their norms: how the norms are spread, and what the rows below a limit come to. Shapes: n rows, D width."""

from typing import Any

import numpy as np

_PER_OCTAVE = 16  # bins; norms are told apart to 4.4%
_LEAST = 2.0**-160  # below every norm of a row that is not 0


class RowNorms:
    """A histogram of norms whose bins hold more than counts, so that rows of any norm can be left out afterwards.

    bins int64 [n bins]: sixteenth octaves that hold rows, ascending. Of their rows: counts int64, sums float64
    [n bins, D], squares float64 (of norms). largest: the norm of the largest row.
    """

    def __init__(self, width: int):
        self.bins, self.counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self.sums, self.squares = np.zeros((0, width)), np.zeros(0)
        self.largest = 0.0

    def add(self, rows: np.ndarray) -> None:
        """rows: float64 [n, D], finite."""
        if not len(rows):
            return
        squares = np.einsum("nd,nd->n", rows, rows)
        self.largest = max(self.largest, float(np.sqrt(squares.max())))
        numbers = np.floor(0.5 * _PER_OCTAVE * np.log2(np.maximum(squares, _LEAST**2))).astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        bins, first = np.unique(numbers[order], return_index=True)
        counts = np.diff([*first, len(rows)])
        self._put(bins, counts, np.add.reduceat(rows[order], first), np.add.reduceat(squares[order], first))

    def merge(self, other: "RowNorms") -> None:
        """Take in the rows of another one."""
        self.largest = max(self.largest, other.largest)
        self._put(other.bins, other.counts, other.sums, other.squares)

    def _put(self, bins: np.ndarray, counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> None:
        every = np.union1d(self.bins, bins)
        own, theirs = np.searchsorted(every, self.bins), np.searchsorted(every, bins)
        for name, more in (("counts", counts), ("sums", sums), ("squares", squares)):
            mine = getattr(self, name)
            total = np.zeros((len(every), *mine.shape[1:]), dtype=mine.dtype)
            total[own] = mine
            total[theirs] += more
            setattr(self, name, total)
        self.bins = every

    def quantile(self, share: float) -> float | None:
        """The norm below which `share` of the rows lie, to the width of a bin; None where it is 0, or of no rows."""
        if not self.counts.sum():
            return None
        below = np.cumsum(self.counts)
        wanted = share * below[-1]
        place = min(int(np.searchsorted(below, wanted)), len(below) - 1)
        inside = (wanted - (below[place] - self.counts[place])) / self.counts[place]
        norm = float(2.0 ** ((self.bins[place] + inside) / _PER_OCTAVE))
        return min(norm, self.largest) if norm > 2 * _LEAST else None

    def below(self, limit: float) -> tuple[int, np.ndarray, float]:
        """Of the rows up to a norm, to the width of a bin: their number, mean [D] and sum of ||h - mean||^2."""
        kept = 2.0 ** (self.bins / _PER_OCTAVE) <= limit
        rows = int(self.counts[kept].sum())
        mean = self.sums[kept].sum(axis=0) / max(rows, 1)
        return rows, mean, max(float(self.squares[kept].sum()) - rows * float(mean @ mean), 0.0)

    def above(self, limit: float) -> tuple[int, float]:
        """Rows above a norm, to the width of a bin: their number and their share of the sum of ||h - mean||^2."""
        chosen = 2.0 ** (self.bins / _PER_OCTAVE) > limit
        mean = self.sums.sum(axis=0) / max(int(self.counts.sum()), 1)
        distances = self.squares - 2 * self.sums @ mean + self.counts * float(mean @ mean)
        total = float(distances.sum())
        return int(self.counts[chosen].sum()), float(distances[chosen].sum()) / total if total > 0 else 0.0

    def report(self, multiple: float) -> dict[str, Any]:
        """Median, 99% and largest norm; rows above `multiple` medians and their share of the variance."""
        median = self.quantile(0.5)
        rows, variance = self.above(multiple * median) if median is not None else (0, 0.0)
        return {
            "median": median,
            "percentile_99": self.quantile(0.99),
            "largest": self.largest,
            "giant_rows": rows,
            "giant_variance": variance,
        }
