"""How the norms of rows are spread, and how much of the variance the largest own: a histogram that can be merged."""

from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import DataError

GIANT = 10.0  # times the median
_PER_OCTAVE = 16  # bins; a bin is 4.4% wide
_LOWEST = -64  # octave below which all norms count as equal


class RowNorms:
    """Rows by norm, in bins of a sixteenth of an octave: their number, sum [D] and squared norms. Merging is exact.

    counts int64 [bins], squares float64 [bins], sums float64 [bins, D], largest: the norm of the largest row.
    """

    def __init__(self, width: int):
        self.bins = np.zeros(0, dtype=np.int64)  # numbers of the bins that hold rows, ascending
        self.counts, self.squares, self.sums = np.zeros(0, np.int64), np.zeros(0), np.zeros((0, width))
        self.largest = 0.0

    def add(self, rows: np.ndarray) -> None:
        """rows: float32 [n, D], finite."""
        squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
        norms = np.sqrt(squares)
        self.largest = max(self.largest, float(norms.max(initial=0.0)))
        octaves = np.log2(np.maximum(norms, 2.0**_LOWEST))
        numbers = np.floor(octaves * _PER_OCTAVE).astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        bins, starts = np.unique(numbers[order], return_index=True)
        if len(bins):
            counts = np.diff(np.append(starts, len(numbers)))
            sums = np.add.reduceat(rows[order], starts, axis=0, dtype=np.float64)
            self._put(bins, counts, np.add.reduceat(squares[order], starts), sums)

    def merge(self, other: "RowNorms") -> None:
        """Take in the rows of another one."""
        self.largest = max(self.largest, other.largest)
        self._put(other.bins, other.counts, other.squares, other.sums)

    def _put(self, bins: np.ndarray, counts: np.ndarray, squares: np.ndarray, sums: np.ndarray) -> None:
        every = np.union1d(self.bins, bins)
        own, theirs = np.searchsorted(every, self.bins), np.searchsorted(every, bins)
        for name, more in (("counts", counts), ("squares", squares), ("sums", sums)):
            mine = getattr(self, name)
            total = np.zeros((len(every), *mine.shape[1:]), dtype=mine.dtype)
            total[own] = mine
            total[theirs] += more
            setattr(self, name, total)
        self.bins = every

    def quantile(self, share: float) -> float:
        """The norm below which `share` of the rows lie, within a bin's width."""
        below = np.cumsum(self.counts)
        wanted = share * below[-1]
        place = min(int(np.searchsorted(below, wanted)), len(below) - 1)
        inside = (wanted - (below[place] - self.counts[place])) / self.counts[place]
        return min(float(2.0 ** ((self.bins[place] + inside) / _PER_OCTAVE)), self.largest)

    def report(self) -> dict[str, Any]:
        """Median, 99% and largest norm; rows above GIANT medians and their share of the sum of ||h - mean||^2.

        The bin that holds GIANT medians counts as below it.
        """
        median = self.quantile(0.5)
        above = self.bins > np.floor(np.log2(max(GIANT * median, 2.0**_LOWEST)) * _PER_OCTAVE)
        mean = self.sums.sum(axis=0) / self.counts.sum()
        distances = self.squares - 2 * self.sums @ mean + self.counts * float(mean @ mean)
        total = float(distances.sum())
        return {
            "median": median,
            "percentile_99": self.quantile(0.99),
            "largest": self.largest,
            "giant_rows": int(self.counts[above].sum()),
            "giant_variance": float(distances[above].sum()) / total if total > 0 else 0.0,
        }

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays."""
        names = ("bins", "counts", "squares", "sums")
        return {**{name: getattr(self, name) for name in names}, "largest": np.array(self.largest)}

    @classmethod
    def of_state(cls, state: dict[str, np.ndarray], where: Path) -> "RowNorms":
        """Inverse of `state`. Raises DataError when something is missing."""
        try:
            found = cls(state["sums"].shape[1])
            for name in ("bins", "counts", "squares", "sums"):
                setattr(found, name, state[name])
            found.largest = float(state["largest"])
        except (KeyError, IndexError) as error:
            raise DataError(f"{where}: is not what was written there; delete it and run the command again") from error
        return found
