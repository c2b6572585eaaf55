"""The normalisation of a data set, computed while its rows pass by."""

import math

import numpy as np

from trainer.errors import UserError


class RunningNormalisation:
    """Mean [D] and mean squared distance from it, float64, merged block by block (Chan, Golub, LeVeque 1979)."""

    def __init__(self, width: int):
        self.rows = 0
        self.width, self.mean = width, np.zeros(width)
        self.squares = 0.0  # sum over rows of ||h - mean||^2

    def add(self, rows: np.ndarray) -> None:
        """rows: [n, D] of any float dtype."""
        block = rows.astype(np.float64)
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

    def result(self, where: str) -> tuple[list[float], float]:
        """(mean, scale) with scale^2 the mean of ||h - mean||^2; raises UserError when all rows are equal."""
        scale = math.sqrt(self.squares / self.rows)
        if not scale > 0:
            raise UserError(f"{where}: all {self.rows} activation rows are equal, there is nothing to train on")
        return self.mean.tolist(), scale
