"""Where accuracy crosses a threshold as the subspace grows: the intrinsic dimension, and how sure of it one can be.

Accuracy rises with d but for noise, so it is fitted by the nearest non-decreasing values (isotonic regression, Barlow
et al. 1972) over the mean of the seeds; between two d the fit is a logistic curve in log d through both, and d90 is
where it meets the threshold. Beside it stands the rule of Li et al. 2018 (arXiv 1804.08838): the smallest d that was
tried whose mean is above it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UsageError

Numbers = NDArray[np.float64]
DRAWS, LEVEL = 2000, 0.95
EDGE = 1e-4
"""How near to 0 and 1 an accuracy is taken to be, at most: the logistic curve reaches neither."""

GRIDS: dict[str, tuple[int, ...]] = {
    "li2018": (10, 50, 100, 200, 300, *range(350, 801, 25), 850, 900, 1000, 1250, 1500),
    "aghajanyan2020": tuple(int(10 ** (2 + 4 * k / 63)) for k in range(64)),
}
"""The d that papers tried, on which a first crossing depends. li2018: arXiv 1804.08838, for MNIST, from its released
results. aghajanyan2020: arXiv 2012.13255, inferred from the values in its tables, which are among these but for one."""


@dataclasses.dataclass(frozen=True)
class Threshold:
    """What accuracy counts as solved.

    mode: local, a share of what training all parameters reaches; global, the share itself, as if the best possible
    were 1; absolute, a value of one's own. value: the share, or the accuracy itself.
    """

    mode: str = "local"
    value: float = 0.9

    def __post_init__(self) -> None:
        if self.mode not in ("local", "global", "absolute"):
            raise UsageError(f"a threshold is local, global or absolute, but not '{self.mode}'")
        if not (math.isfinite(self.value) and 0 < self.value <= 1):
            raise UsageError(f"the threshold is {self.value}, but must be above 0 and at most 1")

    def of(self, baseline: Sequence[float] | Numbers) -> float:
        """The accuracy that it comes to. baseline: of the runs that trained all parameters."""
        return self.value * float(np.mean(baseline)) if self.mode == "local" else self.value

    def __str__(self) -> str:
        if self.mode == "local":
            return f"{self.value:g} of the baseline (local)"
        return f"{self.value:g} {'of 1.0 (global)' if self.mode == 'global' else '(absolute)'}"


@dataclasses.dataclass(frozen=True)
class Crossing:
    """d: where the fit meets the threshold; 0 where the smallest d tried is above it, infinite where none is.

    low, high: the ends of its bootstrap interval, on the same scale. first: the first d whose mean is above, by the
    paper's rule; None where none is. fitted: (d, accuracy) of the fit. threshold: in accuracy.
    """

    d: float
    low: float
    high: float
    first: int | None
    fitted: tuple[tuple[int, float], ...]
    threshold: float


def crossing(
    scores: Mapping[int, Sequence[float]], baseline: Sequence[float], threshold: Threshold, *, seed: int = 0
) -> Crossing:
    """Where the accuracies of `scores`, by d and seed, cross the threshold.

    The interval resamples the baseline's seeds and the subspaces' seeds, those of all d alike where all d have the
    same number. Raises UsageError for no scores.
    """
    if not scores or not baseline or not all(scores.values()):
        raise UsageError("there are no runs to find an intrinsic dimension in")
    ds = np.array(sorted(scores))
    runs = [np.asarray(scores[int(d)], dtype=float) for d in ds]
    base, wanted = np.asarray(baseline, dtype=float), threshold.of(baseline)
    means = np.array([run.mean() for run in runs])
    fitted = isotonic(means, np.array([len(run) for run in runs], dtype=float))
    found = _meeting(ds, fitted, wanted)
    ends = np.quantile(
        _resampled(ds, runs, base, threshold, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest"
    )
    first = next((int(d) for d, value in zip(ds, means, strict=True) if value > wanted), None)
    pairs = tuple((int(d), float(value)) for d, value in zip(ds, fitted, strict=True))
    return Crossing(found, float(min(ends[0], found)), float(max(ends[1], found)), first, pairs, wanted)


def isotonic(values: Numbers, weights: Numbers) -> Numbers:
    """The non-decreasing values nearest to `values` in weighted squares: neighbours that fall are pooled."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, own, count = pools.pop()
            total = own + pool[1]
            pool = ((own * mean + pool[1] * pool[0]) / total, total, count + pool[2])
        pools.append(pool)
    return np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools])


def _meeting(ds: NDArray[np.int64], fitted: Numbers, wanted: float) -> float:
    above = np.flatnonzero(fitted >= wanted)
    if not len(above):
        return math.inf
    at = int(above[0])
    if at == 0:
        return 0.0
    low, high, goal = (math.log(p / (1 - p)) for p in np.clip([fitted[at - 1], fitted[at], wanted], EDGE, 1 - EDGE))
    share = (goal - low) / (high - low) if high > low else 1.0
    return float(math.exp((1 - share) * math.log(ds[at - 1]) + share * math.log(ds[at])))


def _resampled(
    ds: NDArray[np.int64], runs: Sequence[Numbers], base: Numbers, threshold: Threshold, seed: int
) -> Numbers:
    random = np.random.default_rng(seed)
    counts = {len(run) for run in runs}
    found = np.empty(DRAWS)
    for draw in range(DRAWS):
        wanted = threshold.of(base[random.integers(0, len(base), len(base))])
        if len(counts) == 1:
            (count,) = counts
            picked = random.integers(0, count, count)
            means = np.array([run[picked].mean() for run in runs])
        else:
            means = np.array([run[random.integers(0, len(run), len(run))].mean() for run in runs])
        found[draw] = _meeting(ds, isotonic(means, np.array([len(run) for run in runs], dtype=float)), wanted)
    return found
