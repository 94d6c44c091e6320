"""Threads and dtype: given ones are taken, others are measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.ops.products import COMPUTED_ON_CPU
from trimtab.train import machine


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def a_cpu_with_bf16(monkeypatch):
    monkeypatch.setattr(machine, "COMPUTED_ON_CPU", {torch.bfloat16})


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


def test_a_dtype_without_instructions_is_not_tried(monkeypatch):
    speeds = {(1, torch.float32): 50, (4, torch.float32): 90}
    monkeypatch.setattr(machine, "COMPUTED_ON_CPU", set())
    monkeypatch.setattr(machine, "_speed", lambda count, kind: float(speeds[count, kind]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(4))
    chosen = machine.choose()
    assert (chosen.threads, chosen.dtype) == (4, torch.float32)
    assert "bf16 has no instructions" in chosen.reason


def test_one_thread_is_taken_only_where_it_is_clearly_faster(monkeypatch):
    speeds = {(1, torch.float32): 54, (4, torch.float32): 50, (4, torch.bfloat16): 50}
    monkeypatch.setattr(machine, "_speed", lambda count, kind: float(speeds[count, kind]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(4))
    assert machine.choose().threads == 4


@pytest.mark.parametrize("busy", [range(2), range(4, 7), range(9, 12)], ids=["first", "within", "late"])
def test_a_busy_moment_does_not_decide(monkeypatch, busy):
    speeds, calls = {(1, torch.float32): 30, (4, torch.float32): 90, (4, torch.bfloat16): 80}, []

    def speed(count, kind):
        calls.append(kind)
        return speeds[count, kind] / (10.0 if len(calls) - 1 in busy else 1.0)

    monkeypatch.setattr(machine, "_speed", speed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(4))
    chosen = machine.choose()
    assert (chosen.threads, chosen.dtype) == (4, torch.float32)


def test_measuring_stops_where_a_product_is_slow(monkeypatch):
    calls, now = [], [0.0]

    def speed(count, kind):
        calls.append(count)
        now[0] += 0.05
        return 1.0

    monkeypatch.setattr(machine, "_speed", speed)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(4))
    machine.choose()
    assert len(calls) == 4  # one round of each kind


def test_more_threads_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(2))
    with pytest.raises(UsageError, match="threads is 3, but must be at most 2, the cores that this process may use"):
        machine.choose(3)


def test_no_threads_are_refused():
    with pytest.raises(UsageError, match="threads is 0, but must be at least 1"):
        machine.choose(0)


KEPT = """
import torch
from pathlib import Path
from trimtab.train.machine import keep_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
keep_freed_memory()
torch.ones(10)
before = resident()
block = torch.ones(6 * 2**20)  # 24 MiB
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be asked")
def test_memory_that_tensors_give_back_is_kept():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 20 * 2**20


def bare():
    """The environment without what a command of this process may have asked for."""
    return {key: value for key, value in os.environ.items() if key not in machine.KERNEL_CACHES}


COMPILED = """
import torch
from trimtab.train.machine import keep_few_kernels
keep_few_kernels()
kernel = torch.ones(8, 8, 3)
for _ in range(2):
    for length in range(32, 32 + KERNELS):
        torch.nn.functional.conv1d(torch.ones(8, 8, length), kernel)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
@pytest.mark.parametrize(("given", "again"), [({}, True), (dict.fromkeys(machine.KERNEL_CACHES, "1024"), False)])
def test_compiled_products_are_kept_up_to_a_number(given, again):
    """More shapes than are kept are compiled again in a second round, unless more were asked for."""
    more = str(2 * machine.KERNELS)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED.replace("KERNELS", more)],
        env={**bare(), "ONEDNN_VERBOSE": "profile_create", **given},
        capture_output=True,
        text=True,
        check=True,
    )
    made = [line for line in done.stdout.splitlines() if ",convolution," in line and "create:cache_miss" in line]
    assert len(made) == int(more) * (1 + again)


SHAPES = """
import torch
from pathlib import Path
from trimtab.train.machine import keep_few_kernels
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
keep_few_kernels()
x, w, y = (torch.ones(700, 64, dtype=torch.bfloat16) for _ in range(3))
def products(first, last):
    for rows in range(first, last):
        torch.mm(x[:rows], w[:64], out=y[:rows])
products(1, 200)
before = resident()
products(200, 700)
print(resident() - before)
"""


@pytest.mark.skipif(torch.bfloat16 not in COMPUTED_ON_CPU, reason="bf16 is not compiled on this CPU")
def test_ever_new_shapes_of_products_do_not_fill_the_memory():
    done = subprocess.run([sys.executable, "-c", SHAPES], env=bare(), capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50 * 2**20
