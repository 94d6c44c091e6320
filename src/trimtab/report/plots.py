"""The figures of the report: what was trained, what it changed, and what that bought."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.report.run_folder import RunFolder
from trimtab.report.svg import ACCENT, BEFORE, INK, SECOND, draw
from trimtab.report.wording import Measure, ratio_percent

# A running mean says something once it spans several points.
SMOOTH_FROM = 40
BARS_SHOWN = 40


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values at each position, of fewer at the start."""
    return [
        math.fsum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) if math.isfinite(values[i]) else math.nan
        for i in range(len(values))
    ]


def curves(run: RunFolder) -> str:
    """Training and evaluation loss, learning rate and gradient norm over steps."""
    below = [
        (key, title, colour)
        for key, title, colour in (
            ("lr", "Learning rate", ACCENT),
            ("grad_norm", "Gradient norm", ACCENT),
        )
        if run.series("step", key)[0]
    ]

    def paint(figure: Any) -> None:
        figure.get_layout_engine().set(hspace=0.1, wspace=0.06)
        grid = figure.add_gridspec(2 if below else 1, max(1, len(below)), height_ratios=[2.1, 1] if below else [1])
        top = figure.add_subplot(grid[0, :])
        _paint_loss(top, run)
        for column, (key, title, colour) in enumerate(below):
            axes = figure.add_subplot(grid[1, column], sharex=top)
            axes.plot(*run.series("step", key), color=colour, linewidth=1.2, **_marker(run, key))
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("optimizer step")
            axes.margins(x=0.01)
            axes.locator_params(axis="y", nbins=4)
            if key == "lr":
                _scale_rate(axes, max(run.series("step", key)[1]))
        if not below:
            top.set_xlabel("optimizer step")

    alt = "Training and evaluation loss, learning rate and gradient norm against the optimizer step"
    return draw(4.9 if below else 3.2, paint, name="curves", alt=alt, tips={})


def _scale_rate(axes: Any, top: float) -> None:
    """Label learning rates as multiples of one power of ten, which the title names."""
    if not (math.isfinite(top) and 0 < top < 0.01):
        return
    exponent = math.floor(math.log10(top))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 10.0**exponent:.4g}")
    axes.set_title(f"Learning rate, in units of 1e{exponent}")


def _marker(run: RunFolder, key: str) -> dict[str, Any]:
    # A single row draws no line at all.
    return {"marker": "o", "markersize": 4} if len(run.series("step", key)[0]) == 1 else {}


def _paint_loss(axes: Any, run: RunFolder) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, losses = run.series("step", "loss")
    window = max(1, len(losses) // 20)
    if len(losses) >= SMOOTH_FROM:
        axes.plot(steps, losses, color=ACCENT, alpha=0.3, linewidth=0.9, label="training loss, each step")
        mean = running_mean(losses, window)
        axes.plot(steps, mean, color=ACCENT, linewidth=1.9, label=f"training loss, mean of the last {window} rows")
    elif losses:
        axes.plot(steps, losses, color=ACCENT, linewidth=1.6, label="training loss", **_marker(run, "loss"))
    steps, losses = run.series("step", "eval_loss")
    if losses:
        style = {"marker": "o", "markersize": 5, "markeredgewidth": 0, "linewidth": 1.1, "linestyle": (0, (4, 2))}
        axes.plot(steps, losses, color=SECOND, label="evaluation loss", clip_on=False, zorder=5, **style)
    axes.set_title(f"Loss, {run.loss_unit}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.locator_params(axis="y", nbins=7)
    axes.margins(x=0.01)
    if axes.lines:
        axes.legend(loc="upper right", labelcolor=INK)


def measures(rows: Sequence[Measure]) -> str:
    """Before and after side by side, with 95 % bootstrap intervals and the chance level, one band per measure."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        low, high = _extent(rows)
        limit = high + 0.18 * (high - low)
        for index, row in enumerate(rows):
            _paint_measure(axes, row, index, limit)
        axes.set_ylim(len(rows) - 0.42, -0.58)
        axes.set_yticks(range(len(rows)), [row.label for row in rows], color=INK, fontsize=9.5)
        axes.set_xlim(low, limit)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)

    alt = " ".join(row.sentence() for row in rows)
    return draw(0.45 + 0.78 * len(rows), paint, name="measures", alt=alt, tips={})


def _extent(rows: Sequence[Measure]) -> tuple[float, float]:
    """The lowest and highest value to be drawn; zero is always inside, for bars start there."""
    values = [0.0]
    for row in rows:
        values += [row.before, row.after, *(row.interval_before or ()), *(row.interval_after or ())]
        values += [] if row.chance is None else [row.chance]
    finite = [value for value in values if math.isfinite(value)]
    return min(finite), max(max(finite), min(finite) + 1e-9)


def _paint_measure(axes: Any, row: Measure, index: int, limit: float) -> None:
    for offset, value, interval, colour, word in (
        (-0.17, row.before, row.interval_before, BEFORE, "before"),
        (0.17, row.after, row.interval_after, ACCENT, "after"),
    ):
        place = index + offset
        axes.barh(place, value, height=0.28, color=colour, linewidth=0)
        if interval:
            axes.plot(interval, (place, place), color=INK, linewidth=1.1, solid_capstyle="butt")
            for end in interval:
                axes.plot((end, end), (place - 0.06, place + 0.06), color=INK, linewidth=1.1)
        end = max(value, interval[1] if interval else value)
        text = f"{word} {row.show(value)}"
        axes.text(end + limit * 0.012, place, text, va="center", ha="left", fontsize=8.5, color=INK)
    if row.chance is not None:
        axes.plot((row.chance, row.chance), (index - 0.36, index + 0.36), color=SECOND, linewidth=1.5, ls=(0, (3, 2)))
        label = f"chance {row.show(row.chance)}"
        axes.text(row.chance, index - 0.41, label, va="bottom", ha="center", fontsize=8, color=SECOND)


@dataclass
class LayerGrid:
    """The modules of one stack of layers: values[kind][layer]."""

    prefix: str
    values: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def layers(self) -> list[int]:
        return sorted({layer for row in self.values.values() for layer in row})

    @property
    def cells(self) -> int:
        return sum(map(len, self.values.values()))


def layer_grids(changes: Mapping[str, float]) -> tuple[list[LayerGrid], dict[str, float]]:
    """The modules sorted into stacks of numbered layers, and those that belong to none.

    A stack is what shares the text before the first number of its names (model.layers in
    model.layers.12.self_attn.q_proj). It is a grid only with three layers or more, at least half of it filled.
    """
    grids: dict[str, LayerGrid] = {}
    for name, value in changes.items():
        match = re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", name)
        if match:
            grid = grids.setdefault(match[1] or "", LayerGrid(match[1] or ""))
            grid.values[match[3]][int(match[2])] = value
    kept = [g for g in grids.values() if len(g.layers) >= 3 and 2 * g.cells >= len(g.layers) * len(g.values)]
    in_grid = {f"{g.prefix}.{layer}.{kind}".removeprefix(".") for g in kept for kind in g.values for layer in g.layers}
    return kept, {name: value for name, value in changes.items() if name not in in_grid}


def heat_map(grid: LayerGrid, top: float, name: str) -> str:
    """‖ΔW‖/‖W‖ of one stack: a row for each kind of module, a column for each layer; full colour is `top`."""
    kinds, layers = list(grid.values), grid.layers
    tips: dict[str, str] = {}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for y, kind in enumerate(kinds):
            for x, layer in enumerate(layers):
                value = grid.values[kind].get(layer)
                if value is not None:
                    tips[f"cell-{y}-{x}"] = f"{grid.prefix}.{layer}.{kind}: {ratio_percent(value)}".removeprefix(".")
                    _paint_cell(axes, x, y, value, top, f"cell-{y}-{x}")
        axes.set_xlim(-0.5, len(layers) - 0.5)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        every = max(1, math.ceil(len(layers) / 32))
        axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        axes.set_yticks(range(len(kinds)), kinds, color=INK)
        axes.set_xlabel(f"layer of {grid.prefix}" if grid.prefix else "layer")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)

    values = [value for row in grid.values.values() for value in row.values()]
    alt = (
        f"Heat map of the relative change of {len(values)} modules in {len(layers)} layers of {grid.prefix}, from "
        f"{ratio_percent(min(values))} to {ratio_percent(max(values))}; the table below holds each value"
    )
    return draw(1.05 + 0.27 * len(kinds), paint, name=name, alt=alt, tips=tips)


def _opacity(value: float, top: float) -> float:
    # Zero stays faintly visible, so that an unchanged module differs from one that is not adapted.
    return 0.05 + 0.95 * max(0.0, min(1.0, value / top)) if top > 0 and math.isfinite(value) else 0.05


def _paint_cell(axes: Any, x: float, y: float, value: float, top: float, gid: str) -> None:
    from matplotlib.patches import Rectangle

    edge = SECOND if not math.isfinite(value) else "none"
    face = Rectangle((x - 0.46, y - 0.45), 0.92, 0.9, facecolor=(ACCENT, _opacity(value, top)), edgecolor=edge)
    face.set_gid(gid)
    axes.add_patch(face)


def change_bars(changes: Mapping[str, float]) -> str:
    """‖ΔW‖/‖W‖ of modules that stand in no stack of layers, the BARS_SHOWN largest, sorted."""
    rows = sorted(changes.items(), key=lambda item: item[1], reverse=True)[:BARS_SHOWN]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.barh(range(len(rows)), [value for _, value in rows], height=0.62, color=ACCENT, linewidth=0)
        for place, (_, value) in enumerate(rows):
            axes.annotate(
                ratio_percent(value), (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], color=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)

    alt = "Relative change of " + ", ".join(f"{name} {ratio_percent(value)}" for name, value in rows)
    return draw(0.3 + 0.24 * len(rows), paint, name="bars", alt=alt, tips={})
