"""The search for an intrinsic dimension: bracket d by factors, then halve the bracket on the scale of log d.

Every d is trained with every seed, which draws P, the order of the data and θ0 (of a pretrained model, the head alone).
What was trained stays (see `runs`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trimtab.errors import TrimtabError, UsageError
from trimtab.subspace.crossing import Crossing, Threshold, crossing, reaches
from trimtab.subspace.runs import Run, Runs, untrained
from trimtab.subspace.training import Outcome

FURTHER = 4
"""At most so many d more, where the interval is open."""
SWEEP_SEED = 10_000
"""The seed with which learning rates are compared: none that is measured with."""
ENDS = ("d", "low", "high")
"""What of a crossing is infinite where it was not reached."""
MALFORMED = (LookupError, ArithmeticError, TypeError, ValueError, AttributeError)
"""What reading a measurement raises where a value is missing or of another kind."""


class NoDimension(TrimtabError, ValueError):
    """There is no intrinsic dimension to find: the threshold says nothing, or training itself failed.

    reason: why, in a few words for a table.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a search goes.

    seeds: how many, at least 2 for an interval. resolution: the search ends with a bracket whose ends are at most this
    ratio apart; those of an interval of three seeds are 1.2 to 1.9 apart on MNIST. start: the first d; by default √D.
    factor: by which d is raised, or lowered, until the threshold lies between two of them: 4 crosses the six decades of
    a large model in ten steps. grid: exactly these d instead of a search.
    lr: of training all parameters. lr_scale: sqrt multiplies it by √(D/d) in a subspace, since with unit columns a
    step of Adam moves θ by lr √d and not by lr √D; none leaves it as the papers do. rates: multiples of it to choose
    from, with a seed of its own. rates_at: each d has a choice of its own, or what is best at
    the first d that is tried is taken at all of them; where nothing is learned there at any rate, each d has its own
    until there is something to choose by. For the baseline there is a choice in both cases.
    """

    seeds: int = 3
    threshold: Threshold = dataclasses.field(default_factory=Threshold)
    resolution: float = 1.2
    start: int | None = None
    factor: float = 4.0
    grid: tuple[int, ...] = ()
    lr: float = 1e-3
    lr_scale: str = "sqrt"
    rates: tuple[float, ...] = (1.0,)
    rates_at: str = "each"

    def __post_init__(self) -> None:
        problems = []
        if self.seeds < 1:
            problems.append(f"seeds is {self.seeds}, but must be at least 1")
        if self.seeds > SWEEP_SEED:
            problems.append(
                f"seeds is {self.seeds}, but must be at most {SWEEP_SEED}, which chooses the learning rates"
            )
        if not self.resolution >= 1:
            problems.append(f"resolution is {self.resolution}, but must be at least 1")
        if not 1 < self.factor < math.inf:
            problems.append(f"factor is {self.factor}, but must be a number above 1")
        if not 0 < self.lr < math.inf:
            problems.append(f"lr is {self.lr:g}, but must be a number above 0")
        whole = {"seeds": (self.seeds,), "start": (self.start,) if self.start is not None else (), "grid": self.grid}
        problems += [
            f"{name} is {value}, but must be a whole number"
            for name, values in whole.items()
            for value in values
            if value % 1
        ]
        if self.lr_scale not in ("sqrt", "none"):
            problems.append(f"lr_scale is '{self.lr_scale}', but must be sqrt or none")
        if self.rates_at not in ("each", "first"):
            problems.append(f"rates_at is '{self.rates_at}', but must be each or first")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            problems.append(f"rates are {list(self.rates)}, but must be numbers above 0")
        if problems:
            raise UsageError("; ".join(problems))


class Judged(NamedTuple):
    """A split that runs are judged by: train, validation or test. chance: what guessing scores. examples: how many."""

    split: str
    chance: float
    examples: int

    @property
    def noise(self) -> float:
        """Twice the standard error of what guessing scores."""
        return 2 * math.sqrt(max(self.chance * (1 - self.chance), 0.0) / max(self.examples, 1))

    @property
    def clear(self) -> float:
        """The score above which something was learned."""
        return self.chance + self.noise

    def of(self, outcome: Outcome) -> float:
        """The score of a run on this split."""
        return float(getattr(outcome, self.split))


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
    _refuse_chance(plan.threshold.value, scored, plan.threshold)  # no score is above 1, so no threshold above its share
    start = search.start()
    if plan.threshold.mode != "local":
        _refuse_start(float(np.mean(start)), plan.threshold.value, plan.threshold)
    search.ahead([None, search.first])
    baseline = search.baseline()
    wanted = plan.threshold.of(baseline)
    _refuse_baseline(float(np.mean(baseline)), wanted, scored, plan.threshold)
    _refuse_chance(wanted, scored, plan.threshold)
    _refuse_start(float(np.mean(start)), wanted, plan.threshold)
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


def _refuse_chance(wanted: float, scored: Judged, threshold: Threshold) -> None:
    """NoDimension unless the threshold is above what guessing scores by twice its standard error."""
    if wanted <= scored.clear:
        raise NoDimension(
            "threshold near chance",
            f"the threshold, {threshold}, comes to {wanted:.3f}{' at most' if threshold.mode == 'local' else ''}, but "
            f"guessing scores {scored.chance:.3f} give or take {scored.noise:.3f} on {scored.examples:,} examples: any "
            "d would pass. Train longer, score on more examples, or choose another threshold or task",
        )


def _refuse_baseline(mean: float, wanted: float, scored: Judged, threshold: Threshold) -> None:
    """NoDimension for a baseline at chance, or below the threshold: no subspace can be expected to do better."""
    if mean <= scored.clear:
        raise NoDimension(
            "baseline near chance",
            f"training all parameters comes to {mean:.3f}, and guessing scores {scored.chance:.3f} give or take "
            f"{scored.noise:.3f}: nothing is learned. Train longer, or with another learning rate (--lr)",
        )
    if not reaches(mean, wanted):
        raise NoDimension(
            "baseline below the threshold",
            f"training all parameters comes to {mean:.3f}, below the threshold, {threshold}: no d would be expected to "
            "reach it. Train longer, or choose a lower threshold",
        )


def _refuse_start(mean: float, wanted: float, threshold: Threshold) -> None:
    """NoDimension where θ0 reaches the threshold."""
    if reaches(mean, wanted):
        raise NoDimension(
            "reached without training",
            f"before any training the model comes to {mean:.3f}, and the threshold, {threshold}, to {wanted:.3f}: no "
            "dimension is needed, and any d would pass. Choose a higher threshold, or another task",
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
