"""Milliseconds of one training step of MNIST's fully connected net: directly, and in a subspace of each projection.

usage: python benchmarks/subspace_steps.py [--threads 1] [--rounds 15] [--steps 20] [--d 750] [--names uni ...]
    [--diagonal gaussian] [--out benchmarks/results/subspace_steps.jsonl]

The net 784-200-200-10 (D = 199,210) on noise, batches of 128, Adam; the sides take turns, --steps steps of each in
every round, after a run of each that is not timed. --diagonal: G of both fastfoods, by default that of `trimtab measure
dimension`. Bytes are of the tensors that exist, each storage once: `projection_bytes` what P keeps, `training_bytes`
what a run holds besides P and the data at the end of an epoch, when activations and, in a subspace, the gradient of θ
are gone. Appends one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from trimtab.subspace.blocks import DIAGONALS
from trimtab.subspace.projection import PROJECTIONS, Projection, make_projection
from trimtab.subspace.training import train
from trimtab.tasks.problem import SPLITS, Problem, Protocol, Split
from trimtab.tasks.vision import fully_connected
from trimtab.train.machine import spare_memory

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
        chances=dict.fromkeys(SPLITS, 0.1),
        train=examples,
        validation=few,
        test=few,
        scored="test",
        make_model=lambda seed: fully_connected((784, 200, 200, 10), seed),
        loss=torch.nn.functional.cross_entropy,
        score=lambda outputs, targets: float((outputs.argmax(1) == targets).float().mean()),
        defaults=Protocol(epochs=1, batch_size=BATCH),
    )


def held() -> int:
    """Bytes of all tensors there are, each storage once."""
    tensors = [own for own in gc.get_objects() if issubclass(type(own), torch.Tensor)]
    tensors += [own.grad for own in tensors if own.is_leaf and own.grad is not None]
    storages = [own.untyped_storage() for own in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def side(problem: Problem, name: str, d: int, diagonal: str) -> tuple[Projection, int]:
    """A projection that is drawn, and the bytes of what it keeps."""
    before = held()
    options: dict[str, Any] = {"diagonal": diagonal} if name.startswith("fastfood") else {}
    made = make_projection(name, problem.sizes, d, 0, **options)
    made.expand(torch.zeros(d))
    return made, held() - before


def training_bytes(problem: Problem, subspace: Projection | None) -> int:
    """What a run holds besides the data and P."""
    before, found = held(), []
    train(problem, seed=0, subspace=subspace, on_epoch=lambda *_: found.append(held() - before))
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="two at least")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--d", type=int, default=750)
    parser.add_argument("--names", nargs="+", choices=list(PROJECTIONS), default=list(PROJECTIONS))
    parser.add_argument("--diagonal", choices=DIAGONALS, default="gaussian")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "subspace_steps.jsonl")
    asked = parser.parse_args()
    spare_memory()
    torch.set_num_threads(asked.threads)
    problem = made_up(asked.steps)
    sides = {DIRECT: (None, 0), **{name: side(problem, name, asked.d, asked.diagonal) for name in asked.names}}
    bytes_of = {
        name: {"projection_bytes": kept, "training_bytes": training_bytes(problem, subspace)}
        for name, (subspace, kept) in sides.items()
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(asked.rounds):
        for name, (subspace, _) in sides.items():
            outcome = train(problem, seed=0, subspace=subspace)
            times[name].append(1e3 * outcome.seconds / outcome.steps)
    found = {}
    for name, own in times.items():
        low, median, high = (round(value, 3) for value in statistics.quantiles(own))
        found[name] = {"ms": median, "quartiles_ms": [low, high], **bytes_of[name]}
    given = {key: getattr(asked, key) for key in ("threads", "rounds", "steps", "d", "diagonal")}
    line = {**given, "D": problem.D, "sides": found}
    print(json.dumps(line, indent=1))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with asked.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
