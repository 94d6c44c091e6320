"""What a search for an intrinsic dimension came to, and its JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trimtab.subspace.crossing import Crossing, Threshold
from trimtab.subspace.plan import Plan

ENDS = ("d", "low", "high")
"""What of a crossing is infinite where it was not reached."""
MALFORMED = (LookupError, ArithmeticError, TypeError, ValueError, AttributeError)
"""What reading a measurement raises where a value is missing or of another kind."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a search came to.

    crossing: d90, its interval and the fit. scores: of the split that counts, by d and seed. train_scores: of the same
    runs on the training split. start: scores of θ0, before any training; None in older results. baseline,
    baseline_rate: scores and learning rate of training all D parameters. rates: learning rate by d. chosen_by: the
    split by whose score a rate was chosen. diverged: how many runs in subspaces did.
    """

    D: int
    crossing: Crossing
    scores: Mapping[int, tuple[float, ...]]
    train_scores: Mapping[int, tuple[float, ...]]
    start: tuple[float, ...] | None
    baseline: tuple[float, ...]
    baseline_rate: float
    rates: Mapping[int, float]
    chosen_by: str
    diverged: int
    chance: float
    plan: Plan

    @property
    def mean_baseline(self) -> float:
        """The mean score of training all parameters."""
        return float(np.mean(self.baseline))

    @property
    def gap(self) -> float | None:
        """The generalisation gap at the first d above the threshold: the mean training score less the mean score that
        counts. None where no d is above, and where what counts is the training score itself."""
        d = self.crossing.first
        if d is None or self.scores == self.train_scores:
            return None
        return float(np.mean(self.train_scores[d]) - np.mean(self.scores[d]))

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; what was not reached is null."""
        plain = dataclasses.asdict(self)
        plain["crossing"] = {k: None if v == math.inf else v for k, v in plain["crossing"].items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Measured:
        """From what `to_dict` gave, through JSON or not; what else is in it is left.

        Raises one of MALFORMED where it is not that.
        """
        found = plain["crossing"]
        ends = {name: math.inf if found[name] is None else float(found[name]) for name in ENDS}
        fitted = tuple((int(d), float(value)) for d, value in found["fitted"])
        first = None if found["first"] is None else int(found["first"])
        scores, train_scores = (_by_d(plain[name]) for name in ("scores", "train_scores"))
        if {d: len(own) for d, own in scores.items()} != {d: len(own) for d, own in train_scores.items()}:
            raise ValueError("scores and train_scores are not of the same runs")
        if not scores or not plain["baseline"] or first not in (None, *scores):
            raise ValueError("there are no runs, or none at the first d above the threshold")
        D, chance = int(plain["D"]), float(plain["chance"])
        start = None if plain.get("start") is None else tuple(map(float, plain["start"]))
        several = [*scores.values(), *train_scores.values(), plain["baseline"], start or (), (chance,)]
        if not all(0 <= score <= 1 for own in several for score in own):
            raise ValueError("a score is not from 0 to 1")
        if not all(1 <= d <= D for d in scores) or not all(end >= 0 for end in ends.values()):
            raise ValueError("a d is below 1 or above D")
        plan, lists = dict(plain["plan"]), {name: tuple(plain["plan"][name]) for name in ("grid", "rates")}
        return cls(
            D,
            Crossing(first=first, fitted=fitted, threshold=float(found["threshold"]), **ends),
            scores,
            train_scores,
            start,
            tuple(map(float, plain["baseline"])),
            float(plain["baseline_rate"]),
            {int(d): float(rate) for d, rate in plain["rates"].items()},
            str(plain["chosen_by"]),
            int(plain["diverged"]),
            chance,
            Plan(**{**plan, **lists, "threshold": Threshold(**plan["threshold"])}),
        )


def _by_d(plain: Mapping[str, Any]) -> dict[int, tuple[float, ...]]:
    return {int(d): tuple(map(float, own)) for d, own in plain.items()}
