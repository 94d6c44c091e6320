"""Trainers for the runs of a search: each a function that can be sent to another process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from trimtab.subspace.draws import GENERATOR
from trimtab.subspace.projection import make_projection
from trimtab.subspace.runs import Run, Trainer
from trimtab.subspace.training import Outcome, score_start, train
from trimtab.tasks.problem import Problem, Protocol


def problem_trainer(
    make: Callable[[], Problem], protocol: Protocol, projection: str, options: Mapping[str, Any]
) -> Trainer:
    """The trainer of a self-contained problem. make: gives the problem; called once. options: of the projection."""
    return functools.partial(_train, make(), protocol, projection, dict(options))


def about_problem(problem: Problem, protocol: Protocol, projection: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What such runs depend on besides d, seed and learning rate, as plain values."""
    own = {key: value for key, value in dataclasses.asdict(protocol).items() if key != "lr"}
    task = {"task": problem.name, "data": problem.digest, "parameters": problem.D}
    return {**task, "projection": projection, "generator": GENERATOR, **options, **own}


def _train(problem: Problem, protocol: Protocol, projection: str, options: dict[str, Any], run: Run) -> Outcome:
    if run.d == 0:
        return score_start(problem, run.seed)
    subspace = None if run.d is None else make_projection(projection, problem.sizes, run.d, run.seed, **options)
    return train(problem, protocol, seed=run.seed, subspace=subspace, lr=run.lr)
