"""Milliseconds of one training step of MNIST's fully connected net: directly, and in a subspace of each projection.

usage: python benchmarks/subspace_steps.py [--threads 1] [--rounds 15] [--steps 20] [--d 750] [--names uni ...]
    [--out benchmarks/results/subspace_steps.jsonl]

The net 784-200-200-10 (D = 199,210) on noise, batches of 128, Adam; the sides take turns, --steps steps of each in
every round, the first of which is not counted. `bytes` is what training keeps besides the net's activations and P: what
is trained, its gradient and Adam's two averages, and in a subspace also θ, θ0 and the gradient of θ, which every
projection needs. What P keeps is in the lines of hadamard.py. Appends one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch

from trimtab.subspace.problem import Problem, Protocol, Split
from trimtab.subspace.projection import PROJECTIONS, make_projection
from trimtab.subspace.training import train
from trimtab.tasks.vision import fully_connected
from trimtab.train.machine import keep_freed_memory

DIRECT = "all parameters"
BATCH = 128


def made_up(steps: int) -> Problem:
    """Noise of MNIST's shape, as many images as so many steps read."""
    noise = torch.Generator().manual_seed(0)
    examples = Split(
        "noise",
        torch.rand(steps * BATCH, 784, generator=noise),
        torch.randint(10, (steps * BATCH,), generator=noise),
    )
    few = dataclasses.replace(examples, inputs=examples.inputs[:BATCH], targets=examples.targets[:BATCH])
    return Problem(
        name="noise",
        metric="accuracy",
        chance=0.1,
        train=examples,
        validation=few,
        test=few,
        scored="test",
        make_model=lambda seed: fully_connected((784, 200, 200, 10), seed),
        loss=torch.nn.functional.cross_entropy,
        score=lambda outputs, targets: float((outputs.argmax(1) == targets).float().mean()),
        defaults=Protocol(epochs=1, batch_size=BATCH),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="two at least")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--d", type=int, default=750)
    parser.add_argument("--names", nargs="+", choices=list(PROJECTIONS), default=list(PROJECTIONS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "subspace_steps.jsonl")
    asked = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(asked.threads)
    problem = made_up(asked.steps)
    sides = {DIRECT: None, **{name: make_projection(name, problem.sizes, asked.d, 0) for name in asked.names}}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(asked.rounds + 1):
        for name, subspace in sides.items():
            outcome = train(problem, seed=0, subspace=subspace)
            if round_:
                times[name].append(1e3 * outcome.seconds / outcome.steps)
    found = {}
    for name, own in times.items():
        low, median, high = (round(value, 3) for value in statistics.quantiles(own))
        floats = 4 * problem.D if sides[name] is None else 4 * asked.d + 3 * problem.D
        found[name] = {"ms": median, "quartiles_ms": [low, high], "bytes": 4 * floats}
    line = {**{key: getattr(asked, key) for key in ("threads", "rounds", "steps", "d")}, "D": problem.D, "sides": found}
    print(json.dumps(line, indent=1))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with asked.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
