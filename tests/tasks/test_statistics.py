from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.tasks.statistics import bootstrap, mean, paired_bootstrap

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


@given(numbers, st.integers(0, 3))
def test_an_interval_lies_within_its_values(values, seed):
    interval = bootstrap(values, seed=seed, draws=50)
    assert min(values) <= interval.low <= interval.high <= max(values)


def test_the_interval_is_near_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = bootstrap(values.tolist())
    half = 1.96 * values.std() / 20
    # The bootstrap's own noise at 2000 draws is a few percent of the half width.
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(2).random(50).tolist()
    assert bootstrap(values, seed=5) == bootstrap(values, seed=5)
    assert bootstrap(values, seed=5) != bootstrap(values, seed=6)


def test_many_values_are_drawn_in_blocks_without_changing_the_result():
    values = np.random.default_rng(3).random(30_000)
    interval = bootstrap(values.tolist(), draws=150)
    random = np.random.default_rng(0)
    means = [values[random.integers(0, values.size, values.size)].mean() for _ in range(150)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_a_higher_level_gives_a_wider_interval():
    values = np.random.default_rng(4).random(40).tolist()
    narrow, wide = bootstrap(values, level=0.5), bootstrap(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_sees_a_small_change_that_separate_intervals_hide():
    before = np.random.default_rng(5).normal(0, 10, 60)
    after = before + 0.5
    assert bootstrap(before.tolist()).high > bootstrap(after.tolist()).low
    difference = paired_bootstrap(before.tolist(), after.tolist())
    assert difference.low == pytest.approx(0.5)
    assert difference.high == pytest.approx(0.5)


def test_a_gain_is_a_positive_difference():
    assert paired_bootstrap([False, False, True], [True, True, True]).high > 0


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_no_values_and_values_that_are_not_finite_are_refused(values):
    with pytest.raises(UsageError):
        bootstrap(values)


def test_pairs_of_different_length_are_refused():
    with pytest.raises(UsageError, match="2 and 1"):
        paired_bootstrap([1.0, 2.0], [1.0])


@pytest.mark.parametrize("options", [{"draws": 0}, {"level": 0.0}, {"level": 1.0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(UsageError):
        bootstrap([1.0], **options)


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(UsageError):
        mean([])


def test_values_of_one_group_count_as_one_when_groups_are_resampled():
    values = [0.0] * 50 + [1.0] * 50
    alone = bootstrap(values)
    in_two = bootstrap(values, groups=["a"] * 50 + ["b"] * 50)
    assert alone.low > 0.35
    assert (in_two.low, in_two.high) == (0.0, 1.0)


def test_every_value_a_group_of_its_own_is_the_plain_bootstrap():
    values = [0.1, 0.7, 0.4, 0.9, 0.2]
    assert bootstrap(values, groups=list("abcde")) == bootstrap(values)


def test_groups_that_do_not_match_the_values_are_refused():
    with pytest.raises(UsageError, match="3 values, but 2 groups"):
        bootstrap([1.0, 2.0, 3.0], groups=["a", "b"])
