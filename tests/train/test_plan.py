"""Learning rates, lengths of runs, and the settings that make them."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_training import make_examples
from trimtab.data.encode import Example
from trimtab.errors import UsageError
from trimtab.train.plan import Plan, eval_batches
from trimtab.train.settings import Settings


def plan(count=10, **options):
    return Plan.of(make_examples(count), Settings(**{"batch_size": 1, "lr": 1.0, **options}), default_lr=0.5)


def rates(**options):
    made = plan(**options)
    return [made.lr(step) for step in range(1, made.steps + 1)]


def test_a_constant_rate_stays():
    assert rates() == [1.0] * 10


def test_a_linear_rate_falls_evenly_and_every_step_learns():
    assert rates(schedule="linear") == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_a_cosine_rate_follows_half_a_cosine():
    assert rates(schedule="cosine") == pytest.approx([(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])


def test_warm_up_rises_evenly_to_the_rate_and_the_schedule_follows():
    assert rates(warm_up=0.4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])
    assert rates(warm_up=0.5, schedule="linear") == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2])


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warm_up=st.floats(0, 0.99),
    epochs=st.floats(0.05, 3),
)
def test_no_step_is_without_a_rate_and_none_is_above_it(schedule, warm_up, epochs):
    found = rates(schedule=schedule, warm_up=warm_up, epochs=epochs)
    assert all(0 < rate <= 1 for rate in found)


def test_without_a_rate_the_methods_own_is_taken():
    assert plan(lr=None).lr(1) == 0.5


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 10),
        ({"epochs": 2}, 20),
        ({"epochs": 0.25}, 3),
        ({"epochs": 0.3}, 3),  # 0.3 times 10 is a little above 3 in floating point
        ({"epochs": 0.001}, 1),
        ({"batch_size": 3}, 4),
        ({"batch_size": 3, "epochs": 1.5}, 6),
        ({"max_steps": 4}, 4),
        ({"max_steps": 40}, 10),
    ],
)
def test_the_number_of_steps(options, steps):
    assert plan(**options).steps == steps


def test_every_epoch_takes_every_example_once_in_its_own_order():
    made = plan(batch_size=3, epochs=2)
    first, second = ([i for step in steps for i in made.batch(step)] for steps in (range(1, 5), range(5, 9)))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_another_seed_is_another_order():
    orders = [[plan(seed=seed, batch_size=3).batch(step) for step in range(1, 5)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_examples_without_a_target_are_refused():
    silent = [dataclasses.replace(e, supervised=[False] * len(e.supervised)) for e in make_examples(3)]
    with pytest.raises(UsageError, match="none of the 3 examples has a supervised token"):
        Plan.of(silent, Settings(), 1.0)
    with pytest.raises(UsageError, match="none of the 3 evaluation examples"):
        eval_batches(silent, Settings(), 0)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_examples_with_nothing_to_learn_are_in_no_step(batch_size):
    made = make_examples(10)
    for i in (0, 4, 7):  # a first token is never predicted
        made[i] = Example([1, 2, 3], [True, False, False], i + 1, 0, False)
    plan = Plan.of(made, Settings(batch_size=batch_size), 1.0)
    chosen = [plan.batch(step) for step in range(1, plan.steps + 1)]
    assert plan.steps == math.ceil(7 / batch_size)
    assert sorted(i for step in chosen for i in step) == [1, 2, 3, 5, 6, 8, 9]


def test_every_wrong_setting_is_named_at_once():
    with pytest.raises(UsageError) as caught:
        Settings(epochs=0, batch_size=-1, lr=0, warm_up=1, clip=-1, schedule="cosin", packing="packed", micro_batch=9)
    for key in ("epochs", "batch_size", "lr", "warm_up", "clip", "schedule is 'cosin'", "packing is 'packed'"):
        assert key in str(caught.value)


@pytest.mark.parametrize("key", ["epochs", "lr", "weight_decay", "clip", "warm_up"])
def test_nan_is_no_setting(key):
    with pytest.raises(UsageError, match=key):
        Settings(**{key: math.nan})
