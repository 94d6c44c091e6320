"""Steps of training as names of checkpoints tell them."""

from __future__ import annotations

import pytest

from trimtab.models.steps import steps_of


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (("100", "2000", "30"), (100, 2000, 30)),
        (("step-000200", "step1000"), (200, 1000)),
        (("1", "step-000002"), (1, 2)),
        (("checkpoint-500", "checkpoint-1500"), (500, 1500)),
        (("global_step1000", "global_step200"), (1000, 200)),
        (("epoch_3", "epoch_12"), (3, 12)),
        (("stage1-step1000-tokens3B", "stage1-step20-tokens1B"), (1000, 20)),
        (("run2-ckpt_7", "run2-ckpt_11"), (7, 11)),
        (("Checkpoint-5", "checkpoint-6"), (5, 6)),
    ],
    ids=str,
)
def test_the_step_is_read_from_what_trainers_call_checkpoints(names: tuple[str, ...], steps: tuple[int, ...]) -> None:
    assert steps_of(names) == dict(zip(names, steps, strict=True))


@pytest.mark.parametrize(
    "names",
    [("sql-1", "sql-2"), ("step-1", "final"), ("step-1", "epoch-2"), ("footstep3", "footstep4")],
    ids=str,
)
def test_other_numbers_are_no_steps(names: tuple[str, ...]) -> None:
    assert not steps_of(names)
