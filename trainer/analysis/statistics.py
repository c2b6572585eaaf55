"""How sure a figure is."""

import math
from collections.abc import Sequence


def mean_by_subject(values: Sequence[float], subjects: Sequence[str]) -> tuple[float, float | None]:
    """Mean, and its standard error when what belongs to one subject is not independent (sums over subjects, Liang and
    Zeger 1986); None for one subject."""
    mean = sum(values) / len(values)
    sums: dict[str, float] = {}
    for value, subject in zip(values, subjects, strict=True):
        sums[subject] = sums.get(subject, 0.0) + value - mean
    if len(sums) < 2:
        return mean, None
    spread = sum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1)
    return mean, math.sqrt(spread) / len(values)


def jackknife_error(without: Sequence[float]) -> float | None:
    """Standard error of a figure from its values without each of n independent parts (Efron 1982); None for
    one."""
    if len(without) < 2:
        return None
    mean = sum(without) / len(without)
    return math.sqrt(sum((value - mean) ** 2 for value in without) * (len(without) - 1) / len(without))
