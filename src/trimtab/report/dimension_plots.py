"""Figures about intrinsic dimension (after Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, 2012.13255)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trimtab.report.dimension_results import Measurement, told
from trimtab.report.svg import ACCENT, BEFORE, INK, MUTED, SECOND, draw
from trimtab.subspace.crossing import curve
from trimtab.subspace.measured import Measured

DASHED = (0, (4, 2))
D90 = "intrinsic dimension"
LONGEST = 32
"""Characters of a label in a figure."""
LABEL = 8
"""Size of a label beside a point, in points; a character is about 0.55 of it wide."""
BESIDE = (
    *((1, 0), (-1, 0), (0, 1), (0, -1)),
    *((s, up) for up in (1, -1) for s in (1, -1)),
    *((0, 2), (0, -2), (0, 3)),
)
"""Where a label may stand, the best place first: to the right (1), the left (-1) or in line (0), and lines above."""
STEPS = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,))
MOST_TICKS = 8
"""Multiples of powers of ten on a logarithmic axis: the first of STEPS that gives no more."""
Point = tuple[str, float, float]
"""A label, and where it belongs."""
Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in points."""


def accuracy_by_dimension(measured: Measured, metric: str, name: str) -> str:
    """Scores of every run against d, their means, the baseline, the threshold and d90 with its interval."""
    found = measured.crossing

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        ds = sorted(measured.scores)
        for d in ds:
            axes.plot([d] * len(measured.scores[d]), measured.scores[d], "o", color=BEFORE, markersize=4)
        means = [sum(measured.scores[d]) / len(measured.scores[d]) for d in ds]
        axes.plot(ds, means, ".", color=ACCENT, markersize=7, label="mean of the seeds")
        axes.plot(*curve(found.fitted), color=ACCENT, linewidth=1.4, label="fit")
        axes.axhline(measured.mean_baseline, color=INK, linewidth=1.0, label="all parameters")
        axes.axhline(found.threshold, color=INK, linewidth=1.0, linestyle=DASHED, label="threshold")
        axes.axhline(measured.chance, color=MUTED, linewidth=1.0, linestyle=":", label="chance")
        if found.found == "within":
            axes.axvspan(max(found.low, ds[0]), min(found.high, ds[-1]), color=SECOND, alpha=0.2, linewidth=0)
            axes.axvline(found.d, color=SECOND, linewidth=1.4, label="intrinsic dimension")
        axes.set_xscale("log")
        axes.set_xlabel("dimension of the subspace, d")
        axes.set_ylabel(metric)
        axes.set_xticks(_apart(ds))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, labelcolor=INK)

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


def dimension_by_row(several: Sequence[Measurement], name: str) -> str:
    """d90 with its interval, a row for each; an arrow where it lies beyond the d that were tried."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for row, one in enumerate(several):
            low, high = one.span
            if one.found:
                axes.hlines(row, low, high, color=SECOND, linewidth=1.6)
                axes.plot([one.measured.crossing.d], [row], "o", color=ACCENT, markersize=6)
            else:
                above = one.measured.crossing.d == math.inf
                axes.plot([high if above else low], [row], ">" if above else "<", color=MUTED, markersize=6)
        axes.set_yticks(range(len(several)), [_short(one.label) for one in several], color=INK)
        axes.set_ylim(len(several) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        _logarithmic(axes, "x", [end for one in several for end in one.span])
        axes.set_xlabel(D90)

    alt = "Intrinsic dimension: " + "; ".join(f"{one.label} {told(one.measured)}" for one in several)
    return draw(0.9 + 0.32 * len(several), paint, name=name, alt=alt, tips={})


def dimension_against(
    several: Sequence[Measurement],
    value: Callable[[Measurement], float],
    axis: str,
    name: str,
    *,
    logarithmic: bool = False,
    joined: bool = False,
) -> str:
    """d90 with its interval against a value of each: its parameters D, a step of pretraining, the baseline's accuracy.

    Those without a d90 are left out; the alternative text says which.
    """
    shown = sorted((one for one in several if one.found), key=value)
    hidden = [one.label for one in several if not one.found]
    xs, ys = [value(one) for one in shown], [one.measured.crossing.d for one in shown]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for one, x in zip(shown, xs, strict=True):
            axes.vlines(x, *one.span, color=SECOND, linewidth=1.4)
        axes.plot(xs, ys, "o-" if joined else "o", color=ACCENT, markersize=5, linewidth=1.2)
        if max(xs) >= 1000:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if logarithmic:
            _logarithmic(axes, "x", xs)
        _logarithmic(axes, "y", [end for one in shown for end in one.span])
        axes.set_xlabel(axis)
        axes.set_ylabel(D90)
        points = list(zip(xs, ys, strict=True))
        intervals = [((x, one.span[0]), (x, one.span[1])) for one, x in zip(shown, xs, strict=True)]
        joins = list(itertools.pairwise(points)) if joined else []
        _label(figure, axes, [(one.label, *at) for one, at in zip(shown, points, strict=True)], intervals + joins)

    missing = f"; without one: {', '.join(hidden)}" if hidden else ""
    told_each = "; ".join(f"{one.label} {y:,.0f} at {x:,.6g}" for one, x, y in zip(shown, xs, ys, strict=True))
    return draw(3.2, paint, name=name, alt=f"Intrinsic dimension against {axis}: {told_each}{missing}", tips={})


def gap_against_bound(several: Sequence[Point], name: str) -> str:
    """The generalisation gap in accuracy of each (label, √(d/n), gap), with the line √(d/n), the order of the bound.

    d: the first above the threshold, of which the gap is.
    """

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([bound for _, bound, _ in several], [gap for _, _, gap in several], "o", color=ACCENT, markersize=5)
        widest = 1.08 * max(bound for _, bound, _ in several)
        axes.plot([0, widest], [0, widest], color=INK, linewidth=1.0, linestyle=DASHED, label="√(d/n)")
        axes.set_xlabel("√(d/n) at the first d above the threshold, n training examples")
        axes.set_ylabel("generalisation gap, accuracy")
        axes.legend(loc="upper left", labelcolor=INK)
        _label(figure, axes, several, [((0, 0), (widest, widest))])

    alt = "Generalisation gap in accuracy beside √(d/n), both at the first d above the threshold: " + "; ".join(
        f"{label} {gap:+.4f} beside {bound:.4f}" for label, bound, gap in several
    )
    return draw(3.4, paint, name=name, alt=alt, tips={})


def _logarithmic(axes: Any, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis with a few round numbers on it, or the ends of what is too short for those."""
    low, high = min(values), max(values)
    getattr(axes, f"set_{which}scale")("log")
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    grids = [[step * p for p in powers for step in steps if low <= step * p <= high] for steps in STEPS]
    ticks = next((grid for grid in grids if len(grid) <= MOST_TICKS), grids[-1])
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks(ticks if len(ticks) > 1 else sorted({low, high}))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()


def _label(figure: Any, axes: Any, points: Sequence[Point], lines: Sequence[Sequence[Sequence[float]]]) -> None:
    """Write each label beside its point, where no point, no line and no other label is. One that has no room is left
    out: it stands in the table below the figures."""
    axes.margins(x=0.08)
    figure.draw_without_rendering()  # else neither the layout nor the limits of the axes are known
    scale = 72 / figure.dpi
    spots = scale * axes.transData.transform([at for _, *at in points])
    dots = [(x - 9, y - 3, x + 9, y + 3) for x, y in spots]
    taken: list[Box] = []
    for start, end in (scale * axes.transData.transform(line) for line in lines):
        steps = 2 + int(math.dist(start, end) / 3)
        taken += [(x, y, x, y) for x, y in np.linspace(start, end, steps)]
    for own, (label, *at) in enumerate(points):
        width = 0.55 * LABEL * len(_short(label))
        around = [*taken, *dots[:own], *dots[own + 1 :]]
        found = _room(spots[own], width, scale * axes.bbox.extents, around)
        if found is None:
            continue
        (side, up), box = found
        taken.append(box)
        place = {"ha": ("center", "left", "right")[side], "va": "center_baseline", "fontsize": LABEL, "color": INK}
        axes.annotate(_short(label), at, (6 * side, 11 * up), textcoords="offset points", **place)


def _room(spot: Sequence[float], width: float, frame: Box, taken: Sequence[Box]) -> tuple[tuple[int, int], Box] | None:
    """The first of BESIDE where a label of this width is inside the frame and meets nothing; None, if none is."""
    x, y, half = spot[0], spot[1], width / 2
    places = {}
    for side, up in BESIDE:
        middle, height = x + side * (6 + half), y + 11 * up
        places[side, up] = (middle - half, height - LABEL / 2, middle + half, height + LABEL / 2)
    for place, (left, bottom, right, top) in places.items():
        inside = frame[0] <= left and frame[1] <= bottom and right <= frame[2] and top <= frame[3]
        if inside and not any(_meet((left, bottom, right, top), own) for own in taken):
            return place, places[place]
    return None


def _meet(one: Box, other: Box) -> bool:
    """Whether two boxes have a place in common."""
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _short(label: str) -> str:
    """A label that leaves room for the figure: the middle of a long one is left out."""
    half = LONGEST // 2
    return label if len(label) <= LONGEST else f"{label[: half - 1]}…{label[-half:]}"
