"""Where accuracy crosses a threshold as the subspace grows: the intrinsic dimension, and how sure of it one can be.

Accuracy rises with d but for noise, so it is fitted by the nearest non-decreasing values (isotonic regression, Barlow
et al. 1972) over the mean of the seeds; between two d the fit is a logistic curve in log d through both, and d90 is
the least whole d at which it reaches the threshold. Beside it stands the rule of Li et al. 2018 (arXiv 1804.08838): the
smallest d that was tried whose mean is above it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UsageError

Numbers = NDArray[np.float64]
DRAWS, LEVEL = 2000, 0.95
"""Draws of the bootstrap, and the share of them that an interval holds: the ends stand on 50 draws each."""
EDGE = 1e-4
"""How near to 0 and 1 an accuracy is taken to be, at most: the logistic curve reaches neither."""
EQUAL = 1e-6
"""Accuracies that are nearer than this are the same: rounding apart, where the threshold is all of a baseline's."""

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

    @property
    def dimension(self) -> str:
        """What the dimension at this threshold is called: d90 for 0.9 of something."""
        return "the intrinsic dimension" if self.mode == "absolute" else f"d{100 * self.value:g}"


@dataclasses.dataclass(frozen=True)
class Crossing:
    """d: where the fit meets the threshold; 0 where the smallest d tried is above it, infinite where none is.

    low, high: the ends of its interval, on the same scale; both d where there is one seed, which has none. first: the
    first d whose mean is above, by the paper's rule; None where none is. fitted: (d, accuracy) of the fit. threshold:
    in accuracy.
    """

    d: float
    low: float
    high: float
    first: int | None
    fitted: tuple[tuple[int, float], ...]
    threshold: float

    @property
    def found(self) -> str:
        """Where d90 is: "within" the d that were tried, "at most" the smallest of them, or "above" the largest."""
        return "within" if 0 < self.d < math.inf else "above" if self.d else "at most"


def crossing(
    scores: Mapping[int, Sequence[float]], baseline: Sequence[float], threshold: Threshold, *, seed: int = 0
) -> Crossing:
    """Where the accuracies of `scores`, by d and seed, cross the threshold.

    The interval is a bootstrap over the baseline's seeds and the subspaces' seeds, those of all d alike where all d
    have the same number. The seeds are weighted by random numbers (Wu 1986, "Jackknife, Bootstrap and Other Resampling
    Methods in Regression Analysis") whose scale is Student's, so that the interval of a single mean is Student's:
    drawing three seeds with replacement gives all three alike once in nine times, and intervals that hold the truth
    three times in four instead of nineteen in twenty. It reaches at least from the d that was tried below d90 to the
    one above: how accuracy rises between the two is not known, whatever the seeds say. Raises UsageError for no scores.
    """
    if not scores or not baseline or not all(scores.values()):
        raise UsageError("there are no runs to find an intrinsic dimension in")
    ds = np.array(sorted(scores))
    runs = [np.asarray(scores[int(d)], dtype=float) for d in ds]
    base, wanted = np.asarray(baseline, dtype=float), threshold.of(baseline)
    means = np.array([run.mean() for run in runs])
    fitted = isotonic(means, np.array([len(run) for run in runs], dtype=float))
    found = _meeting(ds, fitted, wanted)
    low = high = found
    if len(base) > 1 or max(map(len, runs)) > 1:
        draws, (below, above) = _drawn(ds, runs, base, threshold, seed), _neighbours(ds, found)
        ends = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
        low, high = float(min(ends[0], below)), float(max(ends[1], above))
    first = next((int(d) for d, value in zip(ds, means, strict=True) if value > wanted + EQUAL), None)
    pairs = tuple((int(d), float(value)) for d, value in zip(ds, fitted, strict=True))
    return Crossing(found, low, high, first, pairs, wanted)


def reaches(score: float, wanted: float) -> bool:
    """Whether a score is at the threshold, or above it."""
    return score >= wanted - EQUAL


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
    above = np.flatnonzero(fitted >= wanted - EQUAL)
    if not len(above):
        return math.inf
    at = int(above[0])
    if at == 0:
        return 0.0
    low, high, goal = (_logit(value) for value in (fitted[at - 1], fitted[at], wanted))
    share = min((goal - low) / (high - low), 1.0) if high > low else 1.0
    d = math.exp((1 - share) * math.log(ds[at - 1]) + share * math.log(ds[at]))
    return float(min(max(math.ceil(d), ds[at - 1] + 1), ds[at]))


def _neighbours(ds: NDArray[np.int64], found: float) -> tuple[float, float]:
    """Between which d90 is whatever the fit between two d: the first above the d tried below it, and the d tried above
    it. Where it is beyond the d tried, itself."""
    if not 0 < found < math.inf:
        return found, found
    at = int(np.searchsorted(ds, found))
    return float(ds[at - 1] + 1), float(ds[at])


def _logit(accuracy: float) -> float:
    kept = min(max(accuracy, EDGE), 1 - EDGE)
    return math.log(kept / (1 - kept))


def curve(fitted: Sequence[tuple[int, float]], points: int = 20) -> tuple[list[float], list[float]]:
    """The fit to be drawn: d and accuracies at so many points between two d that were tried."""
    ds, values = [float(fitted[0][0])], [fitted[0][1]]
    for (d, value), (after, higher) in itertools.pairwise(fitted):
        low, high = _logit(value), _logit(higher)
        for share in (step / points for step in range(1, points)):
            ds.append(math.exp((1 - share) * math.log(d) + share * math.log(after)))
            values.append(1 / (1 + math.exp(-((1 - share) * low + share * high))))
        ds.append(float(after))
        values.append(higher)
    return ds, values


def _drawn(ds: NDArray[np.int64], runs: Sequence[Numbers], base: Numbers, threshold: Threshold, seed: int) -> Numbers:
    """What d90 comes to when the means of the seeds are drawn anew, again and again."""
    random = np.random.default_rng(seed)
    counts, means = {len(run) for run in runs}, np.array([run.mean() for run in runs])
    weights = np.array([len(run) for run in runs], dtype=float)
    found = np.empty(DRAWS)
    for draw in range(DRAWS):
        shared = _deviates(random, min(counts)) if len(counts) == 1 else None
        off = [_off(run, _deviates(random, len(run)) if shared is None else shared) for run in runs]
        wanted = threshold.of([base.mean() + _off(base, _deviates(random, len(base)))])
        found[draw] = _meeting(ds, isotonic(means + np.array(off), weights), wanted)
    return found


def _off(values: Numbers, weights: Numbers) -> float:
    """The weighted sum of values, weights adding to 0: none at all, to the last bit, where all values are the same."""
    return float(weights @ (values - values[0]))


def _deviates(random: np.random.Generator, n: int) -> Numbers:
    """Weights w [n] for n values x: w · x is a draw of how far their mean is off, s / √n times Student's t with n - 1
    degrees of freedom, where s² is their variance with n - 1. Zeros for one value."""
    if n == 1:
        return np.zeros(1)
    normal = random.standard_normal(n)
    weights: Numbers = (normal - normal.mean()) / math.sqrt(n * random.chisquare(n - 1))
    return weights
