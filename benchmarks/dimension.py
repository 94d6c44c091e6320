"""The intrinsic dimensions that are published, measured again: MNIST by two nets, shuffled pixels, four projections.

usage: python benchmarks/dimension.py --data DIR [--only NAME ...] [--workers 2] [--seeds 3]
    [--out benchmarks/results/dimension]

--data: the folder that holds MNIST's four IDX files. Each measurement is a search of `trimtab measure dimension` in a
folder of its own, and one that was stopped goes on where it was; results.json stands in its folders global and local,
which `trimtab measure dimension --compare` takes. The protocol is that of Li et al. 2018 (arXiv
1804.08838): 100 epochs of Adam at 1e-3, batches of 128, the same learning rate at every d. Prints a line for each
measurement: d90 by the global and by the local threshold, and the first crossing of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from contextlib import closing
from pathlib import Path
from typing import Any

from trimtab.files import write_whole
from trimtab.report.dimension_results import RESULTS, Told, as_json, protocol_of, result, told
from trimtab.subspace.crossing import Threshold
from trimtab.subspace.projection import make_projection
from trimtab.subspace.runs import Runs
from trimtab.subspace.search import Plan, measure
from trimtab.subspace.trainers import about_problem, problem_trainer
from trimtab.tasks.problems import make_problem

PROJECTION: dict[str, Any] = {"name": "fastfood-blocks", "diagonal": "gaussian"}
MEASUREMENTS: dict[str, dict[str, Any]] = {
    "fc": {"task": "mnist-fc"},
    "lenet": {"task": "mnist-lenet"},
    "fc-shuffled": {"task": "mnist-fc", "shuffle": "pixels"},
    "lenet-shuffled": {"task": "mnist-lenet", "shuffle": "pixels"},
    "fc-dense": {"task": "mnist-fc", "projection": {"name": "dense"}},
    "fc-sparse": {"task": "mnist-fc", "projection": {"name": "sparse-global"}},
    "fc-uni": {"task": "mnist-fc", "projection": {"name": "uni"}},
}
STARTS = {"mnist-fc": 600, "mnist-lenet": 300}
"""Where a search begins; which d are tried depends on it, and what is found does not."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dimension")
    asked = parser.parse_args()
    for name in asked.only:
        one(name, asked)


def one(name: str, asked: argparse.Namespace) -> None:
    """One measurement, by both thresholds: the second search adds only the d that the first did not try."""
    given = dict(MEASUREMENTS[name])
    projection = dict(given.pop("projection", PROJECTION))
    kind, task = projection.pop("name"), given.pop("task")
    make = functools.partial(make_problem, task, asked.data, **given)
    problem = make()
    make_projection(kind, problem.sizes, 1, 0, **projection)
    protocol = dataclasses.replace(problem.defaults, epochs=asked.epochs)
    about = about_problem(problem, protocol, kind, projection)
    trainer = functools.partial(problem_trainer, make, protocol, kind, projection)
    folder = asked.out / name
    found = {}
    with closing(Runs(trainer, about, folder, workers=asked.workers, told=tell)) as runs:
        for mode in ("global", "local"):
            plan = Plan(
                seeds=asked.seeds,
                threshold=Threshold(mode, 0.9),
                start=STARTS[task],
                lr=protocol.lr,
                lr_scale="none",
            )
            split = problem.splits[problem.scored]
            found[mode] = measure(
                runs, problem.D, plan, scored=problem.scored, chance=problem.chance, examples=len(split)
            )
    told_of = protocol_of(about, plan)
    label = Told(f"{problem.name} ({name})", problem.metric, split.name, len(problem.train), told_of)
    for mode, measured in found.items():
        write_whole(folder / mode / RESULTS, as_json(result(measured, label)))
    lines = [f"{mode} {told(measured)}, first crossing {measured.crossing.first}" for mode, measured in found.items()]
    print(f"{name}: {'; '.join(lines)}", flush=True)


def tell(run: Any, outcome: Any) -> None:
    """A line for each run as it ends."""
    print(f"  d {run.d or 'all'} seed {run.seed}: {outcome.test:.4f} in {outcome.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
