"""The normalisation of a data set, computed while its rows pass by, and which rows it leaves out.

A handful of tokens with giant norms would own mean and scale. Rows are therefore summed up by their norms too, and
those whose norm is more than a multiple of the median norm are left out in the end. Shapes: n rows, D width.
"""

import logging
import math
import zipfile
from pathlib import Path

import numpy as np

from trainer.errors import DataError, UserError
from trainer.stream.norms import RowNorms

log = logging.getLogger(__name__)

MAX_NORM = 10.0  # multiples of the median norm
_NORMS = ("bins", "counts", "sums", "squares", "largest")


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
        self.norms = RowNorms(width)

    def add(self, rows: np.ndarray) -> None:
        """rows: [n, D] of any float dtype."""
        block = rows.astype(np.float64)
        self.norms.add(block)
        mean = block.mean(axis=0)
        block -= mean
        self._put(len(block), mean, float(np.vdot(block, block)))

    def merge(self, other: "RunningNormalisation") -> None:
        """Take in the rows of another one."""
        self.norms.merge(other.norms)
        self._put(other.rows, other.mean, other.squares)

    def _put(self, rows: int, mean: np.ndarray, squares: float) -> None:
        delta = mean - self.mean
        total = self.rows + rows
        self.squares += squares + float(delta @ delta) * self.rows * rows / total
        self.mean += delta * (rows / total)
        self.rows = total

    @property
    def median_norm(self) -> float | None:
        """The median norm of the rows, to some percent; None where it is 0 or nothing asks for it."""
        return self.norms.quantile(0.5) if self.max_norm else None

    def result(self, where: str) -> tuple[list[float], float]:
        """(mean, scale) with scale^2 the mean of ||h - mean||^2 over the rows that are not left out; raises UserError
        when all of these are equal."""
        mean, squares, rows = self.mean, self.squares, self.rows
        median = self.median_norm
        if median is not None:
            limit = self.max_norm * median
            giant, share = self.norms.above(limit)
            if giant:
                rows, mean, squares = self.norms.below(limit)
                log.warning(
                    "%s: %d of %d rows have norms above %g times the median norm %.4g and hold %.0f%% of the variance; "
                    "mean and scale leave them out",
                    where, giant, self.rows, self.max_norm, median, 100 * share,
                )  # fmt: skip
        scale = math.sqrt(squares / rows)
        if not scale > 0:
            raise UserError(f"{where}: all {rows} activation rows are equal, there is nothing to train on")
        return mean.tolist(), scale

    def save(self, path: Path) -> None:
        """Write everything that is known of the rows. Raises OSError."""
        norms = {name: getattr(self.norms, name) for name in _NORMS}
        with path.open("wb") as file:
            np.savez(file, **norms, rows=self.rows, mean=self.mean, of_mean=self.squares)

    @classmethod
    def load(cls, path: Path) -> "RunningNormalisation":
        """Inverse of `save`. Raises DataError when the file is not there or damaged."""
        try:
            with np.load(path, allow_pickle=False) as state:
                found = cls(len(state["mean"]))
                found.rows, found.mean, found.squares = int(state["rows"]), state["mean"], float(state["of_mean"])
                for name in _NORMS:
                    setattr(found.norms, name, state[name])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete its folder and run the command again") from error
        found.norms.largest = float(found.norms.largest)
        return found
