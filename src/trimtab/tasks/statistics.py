"""Intervals for the means that tasks report."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
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


def bootstrap(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The percentile bootstrap interval of the mean of `values` (Efron and Tibshirani 1993, chapter 13).

    groups: which group each value belongs to; whole groups are then resampled, as values of one group are alike and
    count for fewer (Davison and Hinkley 1997, section 3.8). draws: how many resamples. level: the share of resampled
    means inside. Few values, or values that are all equal, give an interval that is too narrow. Raises UsageError when
    there are no values, one is not finite, or groups are not one for each.
    """
    data = np.asarray([float(value) for value in values], dtype=np.float64)
    if data.size == 0:
        raise UsageError("there are no values to take an interval of")
    if not np.isfinite(data).all():
        raise UsageError("a value to take an interval of is not finite")
    if draws < 1 or not 0 < level < 1:
        raise UsageError(f"draws must be at least 1 and level between 0 and 1, but they are {draws} and {level}")
    names = range(data.size) if groups is None else groups
    if len(names) != data.size:
        raise UsageError(f"there are {data.size} values, but {len(names)} groups to say which each belongs to")
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    member = np.asarray([number[name] for name in names])
    sums, sizes = np.bincount(member, weights=data), np.bincount(member)
    random = np.random.default_rng(seed)
    means = np.empty(draws)
    # In blocks, so that many values do not make one enormous table of indices.
    block = max(1, 2_000_000 // sums.size)
    for start in range(0, draws, block):
        count = min(block, draws - start)
        picked = random.integers(0, sums.size, (count, sums.size))
        means[start : start + count] = sums[picked].sum(axis=1) / sizes[picked].sum(axis=1)
    ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # A mean of resamples can leave the range of the values by rounding alone.
    low, high = np.clip(ends, data.min(), data.max())
    return Interval(float(low), float(high))


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The bootstrap interval of mean(after) − mean(before), where item i of both is about the same example.

    Raises UsageError when the two differ in length, and as `bootstrap` does.
    """
    if len(before) != len(after):
        raise UsageError(f"paired values must be equally many, but there are {len(before)} and {len(after)}")
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    return bootstrap(differences, groups=groups, seed=seed, draws=draws, level=level)


def mean(values: Sequence[float]) -> float:
    """The mean, correctly rounded. Raises UsageError when there are no values."""
    if not values:
        raise UsageError("there are no values to take the mean of")
    return math.fsum(values) / len(values)
