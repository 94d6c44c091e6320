"""One measurement of an intrinsic dimension: what it says, as JSON and as one self-contained page."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.files import write_whole
from trimtab.report import wording
from trimtab.report.dimension_plots import Point, accuracy_by_dimension, dimension_along, told
from trimtab.report.direction_tables import Table
from trimtab.report.template import filled
from trimtab.subspace.search import Measured


@dataclasses.dataclass(frozen=True)
class Told:
    """What a measurement was of. title: the problem, for people. metric: of its score. split: what was scored.

    protocol: how each run was trained, projection and mode included. features: Σ (in + out) of the weights that a
    LoRA would be put on, and how many they are; None where there is no such question.
    """

    title: str
    metric: str
    split: str
    protocol: Mapping[str, Any]
    features: tuple[int, int] | None = None


def sentences(measured: Measured, about: Told) -> list[str]:
    """What was found and what it is good for."""
    found, plan = measured.crossing, measured.plan
    baseline = sum(measured.baseline) / len(measured.baseline)
    said = [
        f"d90 of {about.title} is {told(measured)} of D = {measured.D:,} parameters, with {plan.seeds} seeds and a "
        f"95 % bootstrap interval: where {about.metric} on {about.split} reaches {found.threshold:.4g}, "
        f"{plan.threshold}, with the baseline at {baseline:.4g} and chance at {measured.chance:.4g}"
    ]
    if found.first is not None:
        said.append(
            f"By the first-crossing rule, the smallest d tried whose mean is above the threshold: {found.first:,}"
        )
    if plan.seeds < 3:
        said.append(f"{plan.seeds} seeds are too few for an interval to be trusted: take 3 or more")
    if measured.diverged:
        said.append(f"{measured.diverged} of the runs in subspaces diverged and count with the score they ended with")
    if 0 < found.d < math.inf:
        said += _budget(found.d, about.features)
    return said


def _budget(d: float, features: tuple[int, int] | None) -> list[str]:
    if features is None:
        return []
    total, weights = features
    rank = max(1, math.ceil(d / total))
    return [
        f"Budget for LoRA: rank r trains r · {total:,} numbers on {weights} weights, so rank {rank} has "
        f"{rank * total:,} of them, {rank * total / d:,.1f} times d90. r is the rank of each matrix and d90 counts "
        "directions of the whole model: they are no conversion of one another, but a task whose d90 is small is one "
        "for a small rank, or for few layers"
    ]


def result(measured: Measured, about: Told) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    return {
        **dataclasses.asdict(about),
        **measured.to_dict(),
        "sentences": sentences(measured, about),
    }


def write_dimension(measured: Measured, about: Told, out: Path) -> Path:
    """Write results.json and report.html into a folder; returns the page."""
    write_whole(out / "results.json", json.dumps(result(measured, about), indent=1, ensure_ascii=False) + "\n")
    return write_whole(out / "report.html", render(measured, about))


def render(measured: Measured, about: Told) -> str:
    """The page as text. The same measurement gives the same page, byte for byte."""
    import markupsafe

    context = {
        "title": f"Intrinsic dimension of {about.title}",
        "lead": f"How many directions training needs, tried in random subspaces of {measured.D:,} parameters.",
        "sentences": sentences(measured, about),
        "figure": markupsafe.Markup(accuracy_by_dimension(measured, about.metric, "accuracy")),
        "caption": (
            "Grey: one run each. The band is the interval of the intrinsic dimension; where there is no band, it was "
            "not found within the d that were tried."
        ),
        "table": score_table(measured),
        "protocol": [(key.replace("_", " "), str(value)) for key, value in about.protocol.items()],
    }
    return filled("dimension.html", context, visible=wording.visible)


class Checkpoint(NamedTuple):
    """One of a pretraining series. at: its step, or its place in the series."""

    label: str
    at: int
    measured: Measured


def series_sentences(series: Sequence[Checkpoint], about: Told) -> list[str]:
    """Whether d90 falls from the first checkpoint to the last, by their intervals."""
    first, last = series[0], series[-1]
    said = [
        f"d90 of {about.title} is {told(first.measured)} at {first.label} and {told(last.measured)} at {last.label}, "
        f"the threshold of each being {first.measured.plan.threshold}"
    ]
    a, b = first.measured.crossing, last.measured.crossing
    if b.high < a.low:
        said.append("It falls along the series: the intervals of the first and the last are apart")
    elif a.high < b.low:
        said.append("It rises along the series: the intervals of the first and the last are apart")
    else:
        said.append("The intervals of the first and the last meet, so these runs do not say that it falls or rises")
    return said


def write_series(series: Sequence[Checkpoint], about: Told, axis: str, out: Path) -> Path:
    """Write a series' results.json and report.html into a folder; returns the page."""
    import markupsafe

    said = series_sentences(series, about)
    plain = [{"label": one.label, "at": one.at, **one.measured.to_dict()} for one in series]
    results = {**dataclasses.asdict(about), "sentences": said, "series": plain}
    write_whole(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    points = [
        Point(one.label, one.at, one.measured.crossing.d, one.measured.crossing.low, one.measured.crossing.high)
        for one in series
    ]
    found = any(0 < point.d < math.inf for point in points)
    context = {
        "title": f"Intrinsic dimension along {about.title}",
        "lead": f"One downstream task, learned from each of {len(series)} checkpoints of one pretraining.",
        "sentences": said,
        "figure": markupsafe.Markup(dimension_along(points, axis, "series")) if found else None,
        "caption": "Lines are 95 % bootstrap intervals. A checkpoint without a point has no d90 within the d tried.",
        "table": series_table(series),
        "protocol": [(key.replace("_", " "), str(value)) for key, value in about.protocol.items()],
    }
    return write_whole(out / "report.html", filled("dimension.html", context, visible=wording.visible))


def series_table(series: Sequence[Checkpoint]) -> Table:
    """A row of text for every checkpoint."""
    rows = [
        (
            one.label,
            told(one.measured),
            f"{sum(one.measured.baseline) / len(one.measured.baseline):.4f}",
            f"{one.measured.crossing.threshold:.4f}",
            f"{one.measured.chance:.4f}",
        )
        for one in series
    ]
    return Table("", ("checkpoint", "d90", "baseline", "threshold", "chance"), rows)


def score_table(measured: Measured) -> Table:
    """A row of text for the baseline and every d."""
    rows = [_row("all parameters", measured.baseline, measured.rates[measured.D])]
    rows += [_row(f"{d:,}", own, measured.rates[d]) for d, own in sorted(measured.scores.items())]
    return Table("", ("d", "mean", "each seed", "learning rate"), rows)


def _row(name: str, scores: Sequence[float], rate: float) -> Sequence[str]:
    return name, f"{sum(scores) / len(scores):.4f}", " ".join(f"{score:.4f}" for score in scores), f"{rate:.2g}"
