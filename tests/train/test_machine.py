"""Threads and dtype: given ones are taken, others are measured."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.train import machine


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_given_values_are_taken_as_they_are():
    chosen = machine.choose(1, "bfloat16")
    assert (chosen.threads, chosen.dtype, torch.get_num_threads()) == (1, torch.bfloat16, 1)


@pytest.mark.parametrize(
    ("speeds", "threads", "dtype"),
    [
        ({(1, torch.float32): 50, (4, torch.float32): 90, (4, torch.bfloat16): 20}, 4, torch.float32),
        ({(1, torch.float32): 50, (4, torch.float32): 30, (1, torch.bfloat16): 200}, 1, torch.bfloat16),
        ({(1, torch.float32): 50, (4, torch.float32): 40, (1, torch.bfloat16): 52}, 1, torch.float32),
    ],
    ids=["all-fp32", "one-bf16", "a-small-gain-is-none"],
)
def test_the_fastest_is_chosen_and_told(monkeypatch, speeds, threads, dtype):
    monkeypatch.setattr(machine, "_speed", lambda count, kind: float(speeds[count, kind]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(4))
    chosen = machine.choose()
    assert (chosen.threads, chosen.dtype) == (threads, dtype)
    assert "1 thread 50, 4 threads" in chosen.reason


def test_no_threads_are_refused():
    with pytest.raises(UsageError, match="threads is 0, but must be at least 1"):
        machine.choose(0)
