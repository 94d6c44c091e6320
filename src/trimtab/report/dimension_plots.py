"""Figures about intrinsic dimension (after Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, 2012.13255)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.report.svg import ACCENT, BEFORE, INK, MUTED, SECOND, draw
from trimtab.subspace.search import Measured

DASHED = (0, (4, 2))


def accuracy_by_dimension(measured: Measured, metric: str, name: str) -> str:
    """Scores of every run against d, their means, the baseline, the threshold and d90 with its interval."""
    found = measured.crossing

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        ds = sorted(measured.scores)
        for d in ds:
            axes.plot([d] * len(measured.scores[d]), measured.scores[d], "o", color=BEFORE, markersize=4)
        means = [sum(measured.scores[d]) / len(measured.scores[d]) for d in ds]
        axes.plot(ds, means, ".-", color=ACCENT, markersize=7, linewidth=1.4, label="mean of the seeds")
        baseline = sum(measured.baseline) / len(measured.baseline)
        axes.axhline(baseline, color=INK, linewidth=1.0, label="all parameters")
        axes.axhline(found.threshold, color=INK, linewidth=1.0, linestyle=DASHED, label="threshold")
        axes.axhline(measured.chance, color=MUTED, linewidth=1.0, linestyle=":", label="chance")
        if 0 < found.d < math.inf:
            high = min(found.high, measured.D)
            axes.axvspan(max(found.low, 1), high, color=SECOND, alpha=0.2, linewidth=0)
            axes.axvline(found.d, color=SECOND, linewidth=1.4, label="intrinsic dimension")
        axes.set_xscale("log")
        axes.set_xlabel("dimension of the subspace, d")
        axes.set_ylabel(metric)
        axes.set_xticks(_apart(ds))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=5, labelcolor=INK)

    alt = f"{metric} against the dimension of the subspace; intrinsic dimension {told(measured)}"
    return draw(3.4, paint, name=name, alt=alt, tips={})


def _apart(ds: Sequence[int]) -> list[int]:
    """Those of the dimensions whose labels have room beside one another on a logarithmic axis."""
    room = math.log(max(ds) / min(ds)) / 14
    kept: list[int] = []
    for d in ds:
        if not kept or math.log(d / kept[-1]) > room:
            kept.append(d)
    return kept


class Point(NamedTuple):
    """One measurement among several. at: where it stands on the horizontal axis; low, high: of its d90."""

    label: str
    at: float
    d: float
    low: float
    high: float


def dimension_along(points: Sequence[Point], axis: str, name: str) -> str:
    """d90 with its interval along a series, such as the steps of a pretraining.

    Points without a finite d90 are left out; the alternative text says which.
    """
    shown = [point for point in points if 0 < point.d < math.inf]
    hidden = [point.label for point in points if point not in shown]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for point in shown:
            high = point.high if point.high < math.inf else point.d
            axes.vlines(point.at, max(point.low, 1), high, color=SECOND, linewidth=1.4)
            axes.annotate(point.label, (point.at, point.d), (5, 5), textcoords="offset points", color=INK, fontsize=8)
        ordered = sorted(shown, key=lambda point: point.at)
        axes.plot([p.at for p in ordered], [p.d for p in ordered], "o-", color=ACCENT, markersize=5, linewidth=1.2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(axis)
        axes.set_ylabel("intrinsic dimension, d90")

    missing = f"; without one: {', '.join(hidden)}" if hidden else ""
    alt = f"Intrinsic dimension against {axis}: " + "; ".join(f"{p.label} {p.d:,.0f}" for p in shown) + missing
    return draw(3.2, paint, name=name, alt=alt, tips={})


def told(measured: Measured) -> str:
    """d90 with its interval, in words."""
    found = measured.crossing
    if found.d == math.inf:
        return f"above {max(measured.scores):,}, the largest d tried"
    if found.d == 0:
        return f"at most {min(measured.scores):,}, the smallest d tried"
    low = f"{found.low:,.0f}" if found.low > 0 else f"below {min(measured.scores):,}"
    high = f"{found.high:,.0f}" if found.high < math.inf else f"above {max(measured.scores):,}"
    return f"{found.d:,.0f} [{low}, {high}]"
