"""Intervals for the means that tasks report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.errors import UsageError


@dataclass(frozen=True)
class Interval:
    """The ends of an interval, in the unit of the values it was made from."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], *, seed: int = 0, draws: int = 2000, level: float = 0.95) -> Interval:
    """The percentile bootstrap interval of the mean of `values` (Efron and Tibshirani 1993, chapter 13).

    draws: how many resamples. level: the share of resampled means inside. Few values, or values that are all equal,
    give an interval that is too narrow. Raises UsageError when there are no values or one is not finite.
    """
    data = np.asarray([float(value) for value in values], dtype=np.float64)
    if data.size == 0:
        raise UsageError("there are no values to take an interval of")
    if not np.isfinite(data).all():
        raise UsageError("a value to take an interval of is not finite")
    if draws < 1 or not 0 < level < 1:
        raise UsageError(f"draws must be at least 1 and level between 0 and 1, but they are {draws} and {level}")
    random = np.random.default_rng(seed)
    means = np.empty(draws)
    # In blocks, so that many values do not make one enormous table of indices.
    block = max(1, 2_000_000 // data.size)
    for start in range(0, draws, block):
        count = min(block, draws - start)
        means[start : start + count] = data[random.integers(0, data.size, (count, data.size))].mean(axis=1)
    ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # A mean of resamples can leave the range of the values by rounding alone.
    low, high = np.clip(ends, data.min(), data.max())
    return Interval(float(low), float(high))


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> Interval:
    """The bootstrap interval of mean(after) − mean(before), where item i of both is about the same example.

    Raises UsageError when the two differ in length, and as `bootstrap` does.
    """
    if len(before) != len(after):
        raise UsageError(f"paired values must be equally many, but there are {len(before)} and {len(after)}")
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    return bootstrap(differences, seed=seed, draws=draws, level=level)


def mean(values: Sequence[float]) -> float:
    """The mean, correctly rounded. Raises UsageError when there are no values."""
    if not values:
        raise UsageError("there are no values to take the mean of")
    return math.fsum(values) / len(values)
