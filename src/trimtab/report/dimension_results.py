"""Measurements of an intrinsic dimension as results.json tells them: written by a command, read to be compared."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import TrimtabError, UsageError
from trimtab.files import read_json
from trimtab.subspace.crossing import Threshold
from trimtab.subspace.measured import MALFORMED, Measured
from trimtab.subspace.plan import Plan

RESULTS = "results.json"
UNSAID = {"optimizer": "adam", "betas": (0.9, 0.999), "l2": 0.0}
"""How runs on sentences are trained, all alike, so that it is not among what they depend on."""
TRAINED = {
    "batch_size": "batches of {}",
    "optimizer": "optimizer {}",
    "l2": "L2 {:g}",
    "mode": "mode {}",
    "projection": "projection {}",
    "diagonal": "diagonal {}",
}
"""Entries of a protocol as a sentence has them."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What a measurement was of. title: the problem, for people. metric: of its score. split: what was scored.

    n: training examples. protocol: how each run was trained, projection and mode included. features: Σ (in + out) of
    the weights that a LoRA would be put on, and how many they are; None where there is no such question.
    """

    title: str
    metric: str
    split: str
    n: int
    protocol: Mapping[str, Any]
    features: tuple[int, int] | None = None

    @property
    def said(self) -> dict[str, Any]:
        """The entries of the protocol that have a value."""
        return {name: value for name, value in self.protocol.items() if value not in (None, {})}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Told:
        """From its fields as plain values; what else is in them is left. Raises one of MALFORMED where they are not."""
        features = None if plain["features"] is None else (int(plain["features"][0]), int(plain["features"][1]))
        title, metric, split = (str(plain[name]) for name in ("title", "metric", "split"))
        if int(plain["n"]) < 1:
            raise ValueError("there are no training examples")
        return cls(title, metric, split, int(plain["n"]), {**UNSAID, **dict(plain["protocol"].items())}, features)


class Measurement(NamedTuple):
    """One of several measurements. label: its name among them. at: its step of pretraining, or its place."""

    label: str
    at: int
    measured: Measured
    about: Told

    @property
    def found(self) -> bool:
        """Whether d90 lies within the d that were tried."""
        return self.measured.crossing.found == "within"

    @property
    def span(self) -> tuple[float, float]:
        """The interval of d90 within the d that were tried."""
        low, high = (
            min(max(end, min(self.measured.scores)), max(self.measured.scores))
            for end in (self.measured.crossing.low, self.measured.crossing.high)
        )
        return low, high

    @property
    def bounds(self) -> tuple[float, float]:
        """What d90 lies between by its interval, 0 and infinity where that is open or there is one seed. An interval
        all below or all above the d that were tried says no more than that it ends, or begins, with them."""
        if self.measured.plan.seeds == 1:
            return 0, math.inf
        low, high = self.measured.crossing.low, self.measured.crossing.high
        return max(self.measured.scores) if low == math.inf else low, high or min(self.measured.scores)

    @property
    def bound(self) -> float | None:
        """√(d/n) for n training examples at the d of the gap, the first above the threshold; None where none is."""
        d = self.measured.crossing.first
        return None if d is None else math.sqrt(d / self.about.n)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"label": self.label, "at": self.at, **result(self.measured, self.about)}


class Unmeasured(NamedTuple):
    """A checkpoint of a series that could not be measured. reason: why, in a few words. told: in a sentence."""

    label: str
    at: int
    title: str
    D: int
    reason: str
    told: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return self._asdict()


def refuse_foreign(out: Path, kind: str) -> None:
    """UsageError where a folder holds what a search, a series or a comparison would overwrite and is none itself."""
    there = _kind(out)
    if there is not None and there != kind:
        raise UsageError(f"{out} holds {OTHERS[there]}, which would be overwritten: choose another --out")


OTHERS = {
    "search": "a single measurement",
    "series": "a series of measurements",
    "comparison": "a comparison of measurements",
    "other": "the results of something else",
}


def _kind(folder: Path) -> str | None:
    if (folder / "search.json").exists():
        return "search"
    if (folder / RESULTS).exists():
        try:
            found = read_json(folder / RESULTS)
        except TrimtabError:
            found = {}
        return "series" if "series" in found else "comparison" if "measurements" in found else "other"
    return "other" if any((folder / name).exists() for name in ("report.html", "config.yaml", "adapter")) else None


def read_measurements(folders: Sequence[str]) -> list[Measurement]:
    """What the folders of earlier measurements hold, each called by its folder's name; those that share one by their
    paths from where these part.

    Raises UsageError for fewer than two, for a folder given twice, for one without the results of a single measurement,
    and for thresholds that differ.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    if len(paths) < 2:
        raise UsageError("a comparison needs the folders of two measurements, or more")
    whole = [path.resolve() for path in paths]
    twice = [str(path) for path, own in zip(paths, whole, strict=True) if whole.count(own) > 1]
    if twice:
        raise UsageError(f"{twice[-1]} is given twice: name each folder once")
    labels = _labels(whole)
    several = [
        Measurement(label, place, *_read(path)) for place, (label, path) in enumerate(zip(labels, paths, strict=True))
    ]
    if len({one.measured.plan.threshold for one in several}) > 1:
        told = ", ".join(f"{one.label} has {one.measured.plan.threshold}" for one in several)
        raise UsageError(f"intrinsic dimensions compare only under one threshold, but {told}")
    return several


def _labels(paths: Sequence[Path]) -> list[str]:
    """The name of each folder; of those that share one, the path without the folders that they share too."""
    found = []
    for path in paths:
        alike = [other for other in paths if other.name == path.name]
        shared = Path(os.path.commonpath([other.parent for other in alike])) if len(alike) > 1 else path.parent
        found.append(path.relative_to(shared).as_posix())
    return found


def _read(folder: Path) -> tuple[Measured, Told]:
    path = folder / RESULTS
    if not path.is_file():
        raise UsageError(f"{folder} holds no {RESULTS}: name the --out of measurements that came to their end")
    plain = read_json(path)
    if "scores" in plain and not {"train_scores", "n"} <= plain.keys():
        raise UsageError(
            f"{path} is an older one, without the scores of training: measure again with the same flags and --out, "
            "where runs that are kept are not trained again"
        )
    try:
        return Measured.from_dict(plain), Told.from_dict(plain)
    except MALFORMED as error:
        raise UsageError(
            f"{path} is of no single measurement of trimtab measure dimension; of several, name the folder of each"
        ) from error


def told(measured: Measured) -> str:
    """d90 with its interval, in words; one seed has none."""
    found, several = measured.crossing, measured.plan.seeds > 1
    smallest, largest = min(measured.scores), max(measured.scores)
    if found.d == math.inf:
        said = f"above {largest:,}, the largest d tried"
        if largest == measured.D:
            said = "not reached at any d tried, D included, at these learning rates"
        return f"{said}; from {found.low:,.0f} on by its interval" if several and 0 < found.low < math.inf else said
    if found.d == 0:
        said = f"at most {smallest:,}, the smallest d tried"
        return f"{said}; up to {found.high:,.0f} by its interval" if several and 0 < found.high < math.inf else said
    low = f"{found.low:,.0f}" if found.low > 0 else f"below {smallest:,}"
    high = f"{found.high:,.0f}" if found.high < math.inf else f"above {largest:,}"
    return f"{found.d:,.0f} [{low}, {high}]" if several else f"{found.d:,.0f}"


def count(number: int, what: str) -> str:
    """A number of things: 1 seed, 3 seeds."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def sentences(measured: Measured, about: Told) -> list[str]:
    """What was found and what it is good for."""
    found, plan = measured.crossing, measured.plan
    name, bracketed = plan.threshold.dimension, found.found == "within" and plan.seeds > 1
    start = "" if measured.start is None else f", θ0 at {_level(sum(measured.start) / len(measured.start))} untrained"
    seeds = count(plan.seeds, "seed") + (", a 95 % interval in brackets" if bracketed else "")
    said = [
        f"{name.replace('the', 'The')} of {about.title} is {told(measured)}, with D = {measured.D:,} parameters and "
        f"{seeds}: where {about.metric} on {about.split} reaches {found.threshold:.4g}{_of_what(plan.threshold)}, with "
        f"the baseline at {measured.mean_baseline:.4g}{start} and chance at {_level(measured.chance)}",
        protocol_sentence(measured, about),
    ]
    said += [chosen for chosen in [choice(measured)] if chosen]
    if found.first is not None:
        said.append(
            f"By the first-crossing rule, the smallest d tried whose mean is above the threshold: {found.first:,}"
        )
    if plan.seeds == 1:
        said.append("One seed has no interval: take 3 or more")
    elif plan.seeds == 2:
        said.append("2 seeds make an interval that is very wide: take 3 or more")
    if measured.diverged:
        said.append(f"Diverged in subspaces, and counted with the score at the end: {count(measured.diverged, 'run')}")
    if found.found == "within":
        said += _budget(found.d, name, about.features)
    return said


def _level(score: float) -> str:
    """A score in a sentence; what is next to nothing is 0."""
    return f"{round(score, 6):.4g}"


def _of_what(threshold: Threshold) -> str:
    """What a threshold is, after the accuracy that it comes to."""
    return {"local": f", {threshold.value:g} of the baseline (local)", "global": " of 1.0 (global)"}.get(
        threshold.mode, " (absolute)"
    )


def choice(measured: Measured) -> str | None:
    """Which multiples of the learning rate were chosen, and whether at an end of those that were tried, beyond which
    nothing is known; None where there was no choice."""
    tried, own = measured.plan.rates, multiples(measured)
    if len(tried) == 1:
        return None
    said = f"The best multiple of the learning rate was {_chosen(own)}"
    ends = sorted({rate for rate in own.values() if rate in (min(tried), max(tried))})
    beyond = f"; nothing beyond {' and '.join(f'{rate:g}' for rate in ends)} was tried" if ends else ""
    return f"{said}{beyond}"


def multiples(measured: Measured) -> dict[int | None, float]:
    """The multiple of the learning rate that was chosen at each d; None for all parameters."""
    plan = measured.plan
    found: dict[int | None, float] = {None: measured.baseline_rate / plan.lr}
    for d, rate in measured.rates.items():
        found[d] = rate / plan.lr / (math.sqrt(measured.D / d) if plan.lr_scale == "sqrt" else 1.0)
    return {d: min(plan.rates, key=lambda rate, own=own: abs(rate - own)) for d, own in found.items()}  # type: ignore[misc]


def protocol_sentence(measured: Measured, about: Told) -> str:
    """How each run was trained; the learning rate of every d stands in the table."""
    own, plan = about.protocol, measured.plan
    said = [count(own["epochs"], "epoch")] if "epochs" in own else []
    said += [words.format(own[key]) for key, words in TRAINED.items() if key in own]
    scale = "times √(D/d)" if plan.lr_scale == "sqrt" else "the same"
    said.append(f"learning rate {plan.lr:g} for all parameters and {scale} in a subspace")
    if len(plan.rates) > 1:
        tried = ", ".join(f"{rate:g}" for rate in plan.rates)
        once = ", chosen once for all d from the first where something is learned" if plan.rates_at == "first" else ""
        said.append(f"each times the best of {tried} by the {measured.chosen_by} split{once}")
    return f"Each run was trained with {', '.join(said)}"


def _chosen(own: Mapping[int | None, float]) -> str:
    """Which multiple of the rate each d has, those of one multiple in a row told together."""
    within = sorted((d, rate) for d, rate in own.items() if d is not None)
    if len({rate for _, rate in within}) == 1:
        return f"{own[None]:g} for all parameters and {within[0][1]:g} in every subspace"
    parts = [(rate, [d for d, _ in group]) for rate, group in itertools.groupby(within, key=lambda pair: pair[1])]
    spans = [f"{rate:g} at d = {ds[0]:,}{f' to {ds[-1]:,}' if len(ds) > 1 else ''}" for rate, ds in parts]
    return f"{own[None]:g} for all parameters and in subspaces {', '.join(spans)}"


def _budget(d: float, name: str, features: tuple[int, int] | None) -> list[str]:
    caution = (
        f"r is the rank of each matrix and {name} counts directions of the whole model: neither follows from the "
        "other, but a task that needs few directions is one for a small rank, or for few layers"
    )
    total, weights = features or (0, 0)
    if not total:
        return [f"No rank of a LoRA follows from it: {caution}"]
    rank = max(1, math.ceil(d / total))
    return [
        f"Budget for LoRA: rank r trains r · {total:,} numbers on {weights} weights, so rank {rank} has "
        f"{rank * total:,} of them, {rank * total / d:,.1f} times {name}. {caution}"
    ]


def result(measured: Measured, about: Told) -> dict[str, Any]:
    """Everything as plain values, for JSON. found: where d90 is, within the d tried or not (`Crossing.found`). gap: the
    generalisation gap at the first d above the threshold."""
    return {
        **dataclasses.asdict(about),
        "found": measured.crossing.found,
        **measured.to_dict(),
        "gap": measured.gap,
        "sentences": sentences(measured, about),
    }


def protocol_of(about: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """How the runs of a search were trained, for `Told`. about: what they depend on besides d, seed and rate."""
    return {**UNSAID, **about, "lr": plan.lr, "lr in a subspace": "lr · √(D/d)" if plan.lr_scale == "sqrt" else "lr"}


def as_json(results: Mapping[str, Any]) -> str:
    """The text of a results.json."""
    return json.dumps(results, indent=1, ensure_ascii=False) + "\n"
