from __future__ import annotations

import math
import random
import re
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.report import plots, wording
from trimtab.report.wording import Measure

finite = st.floats(-1e12, 1e12)


def test_a_decoder_makes_one_grid_of_layers_by_kinds(folders: ModuleType) -> None:
    changes = {row["name"]: row["relative_change"] for row in folders.layers()}
    (grid,), rest = plots.layer_grids(changes)
    assert (grid.prefix, len(grid.layers), len(grid.values)) == ("model.layers", 30, 7)
    assert grid.values["self_attn.q_proj"][12] == changes["model.layers.12.self_attn.q_proj"]
    assert rest == {}


def test_an_encoder_and_a_decoder_are_two_grids_and_the_head_stands_apart() -> None:
    changes = {
        f"{side}.block.{layer}.layer.0.SelfAttention.{kind}": 0.1
        for side in ("encoder", "decoder")
        for layer in range(6)
        for kind in "qv"
    }
    grids, rest = plots.layer_grids(changes | {"lm_head": 0.2})
    assert [grid.prefix for grid in grids] == ["encoder.block", "decoder.block"]
    assert rest == {"lm_head": 0.2}


def test_names_without_layers_or_with_few_fall_back_to_bars() -> None:
    changes = {"conv": 0.1, "features.0": 0.2, "layer1.0.conv1": 0.3, "layer1.1.conv1": 0.4, "0.weight": 0.5}
    grids, rest = plots.layer_grids(changes)
    assert grids == []
    assert rest == changes


names = st.lists(st.sampled_from(["a", "layers", "0", "1", "2", "3", "q"]), min_size=1, max_size=5).map(".".join)


@given(st.dictionaries(names, st.floats(0, 1), max_size=60))
def test_every_module_is_in_a_grid_or_among_the_rest_once(changes: dict[str, float]) -> None:
    grids, rest = plots.layer_grids(changes)
    found = dict(rest)
    for grid in grids:
        for kind, row in grid.values.items():
            for layer, value in row.items():
                name = f"{grid.prefix}.{layer}.{kind}" if grid.prefix else f"{layer}.{kind}"
                assert name not in found
                found[name] = value
    assert found == changes


def test_a_larger_change_has_a_stronger_cell() -> None:
    grid = plots.LayerGrid("l")
    for layer, value in enumerate((0.0, 0.01, 0.02)):
        grid.values["q"][layer] = value
    svg = plots.heat_map(grid, 0.02, "heat")
    shades = [float(found) for found in re.findall(r"fill: var\(--accent\); fill-opacity: ([\d.]+)", svg)]
    assert shades == sorted(shades)
    assert len(shades) == 2  # full strength has no opacity
    assert svg.count("<title>") == 3
    assert "<title>l.1.q: 1.00" in svg


def test_the_running_mean_covers_the_last_values_only() -> None:
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(50)]
    mean = plots.running_mean(values, 5)
    assert mean[0] == values[0]
    assert mean[20] == pytest.approx(sum(values[16:21]) / 5, abs=1e-12)  # rounding of five additions


def test_a_gap_in_the_loss_stays_a_gap() -> None:
    assert math.isnan(plots.running_mean([1.0, math.nan, 3.0], 1)[1])


@given(finite, finite, finite, finite, st.none() | finite)
def test_bars_intervals_and_chance_lie_inside_the_axis(a: float, b: float, c: float, d: float, chance: float) -> None:
    row = Measure("x", a, b, (min(a, c), max(a, c)), (min(b, d), max(b, d)), chance, {})
    low, high = plots._extent([row])
    assert low <= min(a, b, c, d, 0.0)
    assert high >= max(a, b, c, d, 0.0)
    assert low < high


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.0213, "0.0213"), (12340.4, "12,340"), (-1.5, "−1.50"), (3.1e-7, "3.10e−07"), (math.inf, "∞")],
)
def test_numbers_keep_three_significant_digits(value: float, shown: str) -> None:
    assert wording.number(value) == shown


@given(st.floats(1e-4, 1e9))
def test_a_shown_number_is_near_the_number(value: float) -> None:
    assert float(wording.number(value).replace(",", "")) == pytest.approx(value, rel=0.005)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(41.26, "41.3 s"), (59.99, "60.0 s"), (372.4, "6 min 12 s"), (7500, "2 h 05 min")]
)
def test_durations_are_read_at_a_glance(seconds: float, shown: str) -> None:
    assert wording.duration(seconds) == shown


def test_control_characters_are_made_visible() -> None:
    assert wording.visible("a\x00b\x1b[31m\n\tc\r\x7f\ud800") == "a␀b␛[31m\n\tc␍\\u007f\\ud800"
