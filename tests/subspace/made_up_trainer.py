"""A trainer that trains nothing: accuracy is a curve of d, shifted by the seed. Other processes import it."""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from trimtab.subspace.runs import Run
from trimtab.subspace.training import Outcome

D = 100_000


def train(
    run: Run, *, d90: float, notes: Path | None, seconds: float, baseline: float, diverges: bool, paired: bool
) -> Outcome:
    if run.d == 0:
        return Outcome(run.seed, 0, run.lr, 0.1, 0.1, 0.1, 2.0, 2.0, 0.0, 0, diverged=False)
    if notes is not None:
        with notes.open("a") as file:
            file.write(f"{run.d} {run.seed} {os.getpid()}\n")
        if paired:
            wait_for_another(notes)
    time.sleep(seconds)
    shift = 1 + 0.02 * (run.seed % 3 - 1)
    score = baseline
    if run.d is not None:
        score *= 1 / (1 + math.exp(-2 * math.log(run.d / (d90 * shift)) - math.log(9)))
    bad = diverges and run.d is None
    return Outcome(run.seed, run.d or D, run.lr, score, score, score, 2.0, 3.0 if bad else 0.1, 1.0, 10, bad)


def wait_for_another(notes: Path) -> None:
    """Return when the run of an odd line has one after it. TimeoutError when none comes."""
    own, end = len(notes.read_text().splitlines()), time.monotonic() + 300
    while len(notes.read_text().splitlines()) < own + own % 2:
        if time.monotonic() > end:
            raise TimeoutError(f"no run was begun beside number {own}")
        time.sleep(0.01)


def trainer(
    d90: float = 700.0,
    notes: Path | None = None,
    seconds: float = 0.0,
    baseline: float = 1.0,
    diverges: bool = False,
    paired: bool = False,
) -> Callable[[Run], Outcome]:
    """paired: every two runs are to be under way at once."""
    return functools.partial(
        train, d90=d90, notes=notes, seconds=seconds, baseline=baseline, diverges=diverges, paired=paired
    )


def knowing_trainer(broken: bool) -> Callable[[Run], Outcome]:
    """θ0 has a loss that is no number, or solves all."""

    def train(run: Run) -> Outcome:
        loss = math.nan if broken else 0.1
        return Outcome(run.seed, D if run.d is None else run.d, run.lr, 0.9, 0.9, 0.9, loss, 0.1, 0.0, 1, False)

    return train


def killed_trainer() -> Callable[[Run], Outcome]:
    """Its process ends as one does that the system kills."""
    return lambda run: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[return-value]
