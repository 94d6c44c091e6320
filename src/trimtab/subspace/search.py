"""The search for an intrinsic dimension: bracket d by factors, then halve the bracket on the scale of log d.

Every d is trained with every seed, which draws P, the order of the data and θ0 (of a pretrained model, the head alone).
What was trained stays (see `runs`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from trimtab.errors import UsageError
from trimtab.subspace.crossing import crossing, reaches
from trimtab.subspace.judged import Judged, NoDimension, refuse_baseline, refuse_chance, refuse_start
from trimtab.subspace.measured import Measured
from trimtab.subspace.plan import SWEEP_SEED, Plan
from trimtab.subspace.runs import Run, Runs, untrained
from trimtab.subspace.training import Outcome

FURTHER = 4
"""At most so many d more, where the interval is open."""


def measure(
    runs: Runs,
    D: int,
    plan: Plan,
    *,
    scored: Judged,
    chosen: Judged | None = None,
    least: int = 1,
    most: int | None = None,
    at: Callable[[str], None] | None = None,
) -> Measured:
    """Find d90.

    scored: the split whose score counts. chosen: the split by whose score learning rates are chosen; by default that.
    least, most: the smallest and the largest d that can be trained, by default 1 and D. at(text) hears what is being
    trained. Raises UsageError for another d; NoDimension for a baseline that diverged, is not clear of chance or misses
    the threshold, for a threshold that is not clear of chance, and for one that θ0 passes without any training.
    """
    most = D if most is None else most
    search = _Search(runs, D, plan, scored, chosen or scored, least, most, at or (lambda text: None))
    wrong = [d for d in (*plan.grid, search.first) if not least <= d <= most]
    if wrong:
        why = f", since SAID spends {least - 1} on the λ of its layers," if least > 1 else ""
        limit = f"D = {D:,}, all parameters" if most == D else f"{most:,}, beyond which this projection has no room"
        raise UsageError(f"d is {wrong[0]}, but must be at least {least}{why} and at most {limit}")
    refuse_chance(plan.threshold.value, scored, plan.threshold)  # no score is above 1, so no threshold above its share
    start = search.start()
    if plan.threshold.mode != "local":
        refuse_start(float(np.mean(start)), plan.threshold.value, plan.threshold)
    search.ahead([None, search.first])
    baseline = search.baseline()
    wanted = plan.threshold.of(baseline)
    refuse_baseline(float(np.mean(baseline)), wanted, scored, plan.threshold)
    refuse_chance(wanted, scored, plan.threshold)
    refuse_start(float(np.mean(start)), wanted, plan.threshold)
    if plan.grid:
        search.ahead(plan.grid)
        for d in plan.grid:
            search.mean(d)
    else:
        search.bracket_and_halve(wanted)
        search.close_interval(baseline)
    scores = {d: search.scores[d] for d in sorted(search.scores)}
    return Measured(
        D=D,
        crossing=crossing(scores, baseline, plan.threshold),
        scores=scores,
        train_scores={d: search.train_scores[d] for d in scores},
        start=tuple(start),
        baseline=tuple(baseline),
        baseline_rate=search.rate(None),
        rates={d: search.rate(d) for d in scores},
        chosen_by=search.chosen.split,
        diverged=search.diverged,
        chance=scored.chance,
        plan=plan,
    )


class _Search:
    def __init__(
        self,
        runs: Runs,
        D: int,
        plan: Plan,
        scored: Judged,
        chosen: Judged,
        least: int,
        most: int,
        at: Callable[[str], None],
    ) -> None:
        self.runs, self.D, self.plan, self.scored, self.chosen, self.at = runs, D, plan, scored, chosen, at
        self.least, self.most = least, most
        self.chosen_at: list[int] = []
        self.scores: dict[int, tuple[float, ...]] = {}
        self.train_scores: dict[int, tuple[float, ...]] = {}
        self.diverged = 0

    @property
    def first(self) -> int:
        """The d that is tried first."""
        if self.plan.grid:
            return self.plan.grid[0]
        if self.plan.start is not None:
            return self.plan.start
        return min(max(self.least, round(math.sqrt(self.D))), self.most)

    def ahead(self, ds: Sequence[int | None]) -> None:
        """Let the workers start on all that these d are certain to need: a choice of the learning rate that may stand
        for later d is of the first alone."""
        for d in ds:
            if d in (None, self.first) or self.plan.rates_at == "each":
                self.runs.begin(self.sweep(d))
        for d in ds:
            self.runs.begin(self.repeats(d))

    def baseline(self) -> list[float]:
        """Scores of training all parameters. NoDimension where one diverged."""
        self.at("all parameters")
        outcomes = self.trained(None)
        failed = [outcome.seed for outcome in outcomes if outcome.diverged]
        if failed:
            raise NoDimension(
                "baseline diverged",
                f"training all parameters diverged with seed {failed[0]}: a share of that is no threshold. Lower the "
                "learning rate (--lr)",
            )
        return [self.scored.of(outcome) for outcome in outcomes]

    def start(self) -> list[float]:
        """Scores of θ0. NoDimension where its loss is no number."""
        self.at("θ0, untrained")
        outcomes = self.runs.outcomes(untrained(seed) for seed in range(self.plan.seeds))
        if not all(math.isfinite(outcome.first_loss) for outcome in outcomes):
            raise NoDimension(
                "no number before training",
                "the loss is no number before any training: weights of the model, or its data, are infinite or NaN",
            )
        return [self.scored.of(outcome) for outcome in outcomes]

    def mean(self, d: int) -> float:
        """The mean score in d dimensions."""
        if d not in self.scores:
            self.at(f"d = {d:,}")
            outcomes = self.trained(d)
            self.diverged += sum(outcome.diverged for outcome in outcomes)
            self.scores[d] = tuple(self.scored.of(outcome) for outcome in outcomes)
            self.train_scores[d] = tuple(outcome.train for outcome in outcomes)
        return float(np.mean(self.scores[d]))

    def bracket_and_halve(self, wanted: float) -> None:
        """Train at d until the threshold lies between two that are near one another."""
        low, high = 0, self.first
        if reaches(self.mean(high), wanted):
            while high > self.least and not low:
                below = max(self.least, int(high / self.plan.factor))
                low, high = (0, below) if reaches(self.mean(below), wanted) else (below, high)
        else:
            while not reaches(self.mean(high), wanted):
                if high == self.most:
                    return
                low, high = high, min(self.most, math.ceil(high * self.plan.factor))
        while low and high - low > 1 and high / low > self.plan.resolution:
            middle = min(max(round(math.sqrt(low * high)), low + 1), high - 1)
            low, high = (low, middle) if reaches(self.mean(middle), wanted) else (middle, high)

    def close_interval(self, baseline: Sequence[float]) -> None:
        """Go on where the fit, which pools means that fall, has d90 beyond the d tried. Then train a few d more where
        the interval has no upper or no lower end among those there are."""
        further = 0
        while further < FURTHER:
            found = crossing(self.scores, baseline, self.plan.threshold)
            largest, smallest, factor = max(self.scores), min(self.scores), max(self.plan.resolution, 1.1)
            if found.d == 0 and smallest > self.least:
                self.mean(max(self.least, int(smallest / self.plan.factor)))
            elif found.d == math.inf and largest < self.most:
                self.mean(min(self.most, math.ceil(largest * self.plan.factor)))
            elif found.high == math.inf > found.d and largest < self.most:
                self.mean(min(self.most, math.ceil(largest * factor)))
                further += 1
            elif found.low == 0 < found.d and smallest > self.least:
                self.mean(max(self.least, math.floor(smallest / factor)))
                further += 1
            else:
                return

    def trained(self, d: int | None) -> list[Outcome]:
        """The runs of all seeds, at the learning rate for d."""
        return self.runs.outcomes(self.repeats(d))

    def repeats(self, d: int | None) -> Iterator[Run]:
        """A run for each seed. The learning rate is chosen when the first is asked for."""
        rate = self.rate(d)
        for seed in range(self.plan.seeds):
            yield Run(d, seed, rate)

    def sweep(self, d: int | None) -> list[Run]:
        """The runs that the learning rate for d is chosen by; none where there is no choice."""
        if len(self.plan.rates) == 1:
            return []
        if d is None or self.plan.rates_at == "each":
            return self.rates_at(d)
        before = itertools.takewhile(lambda earlier: earlier != d, self.chosen_at)
        return self.rates_at(next((earlier for earlier in before if self.says_something(earlier)), d))

    def rates_at(self, d: int | None) -> list[Run]:
        """A run at each of the learning rates."""
        return [Run(d, SWEEP_SEED, rate) for rate in self.scaled(d)]

    def says_something(self, d: int) -> bool:
        """Whether at any of the rates something is learned in d dimensions."""
        tried = self.runs.outcomes(self.rates_at(d))
        return any(self.chosen.of(outcome) > self.chosen.clear and not outcome.diverged for outcome in tried)

    def rate(self, d: int | None) -> float:
        """The learning rate in d dimensions: scaled, and the best of the plan's multiples."""
        tried = self.runs.outcomes(self.sweep(d))
        if d is not None and d not in self.chosen_at:
            self.chosen_at.append(d)
        best = max(range(len(tried)), key=lambda i: (not tried[i].diverged, self.chosen.of(tried[i])), default=0)
        return self.scaled(d)[best]

    def scaled(self, d: int | None) -> list[float]:
        """The learning rates to choose from in d dimensions."""
        scale = math.sqrt(self.D / d) if d and self.plan.lr_scale == "sqrt" else 1.0
        return [self.plan.lr * scale * multiple for multiple in self.plan.rates]
