"""The intrinsic dimensions that are published, measured again: MNIST by two nets, shuffled pixels, four projections.

usage: python benchmarks/dimension.py --data DIR [--only NAME ...] [--workers 2] [--seeds 3] [--epochs N]
    [--out benchmarks/results/dimension]

--data: the folder that holds MNIST's four IDX files. Each measurement is a search of `trimtab measure dimension` in a
folder of its own, and one that was stopped goes on where it was; results.json stands in its folders global and local,
which `trimtab measure dimension --compare` takes. The protocol is that of Li et al. 2018 (arXiv 1804.08838): Adam at
1e-3, batches of 128, the same learning rate at every d, 100 epochs for fc and lenet. What is compared with one another
is trained for 20 epochs: the projections on a grid of d, since a step with a dense one takes ten times as long, with
the runs of all parameters shared, which do not depend on them; fc-shuffled beside projection-fastfood-blocks, on the
same grid; and lenet-shuffled beside lenet-short. --epochs: in the place of either, for a trial in an --out of its own.
Prints the protocol of each measurement, a line for each run, and d90 by the global and by the local threshold with the
first crossing of each and the minutes until it was found, of the local one since the global one was begun.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from trimtab.files import write_whole
from trimtab.report.dimension_results import RESULTS, Told, as_json, protocol_of, result, told
from trimtab.subspace.crossing import Threshold
from trimtab.subspace.plan import Plan
from trimtab.subspace.runs import MADE_WITH, Runs
from trimtab.subspace.search import measure
from trimtab.subspace.subject import of_problem
from trimtab.tasks.problems import make_problem


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is measured. options: of the task. start: where a search begins; which d are tried depends on it, and what
    is found does not. grid: exactly these d instead."""

    task: str = "mnist-fc"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    projection: str = "fastfood-blocks"
    start: int | None = None
    grid: tuple[int, ...] = ()
    epochs: int = 100

    @property
    def projection_options(self) -> dict[str, Any]:
        """Fastfood's G is that of the paper."""
        return {"diagonal": "gaussian"} if self.projection.startswith("fastfood") else {}


SHUFFLED = {"shuffle": "pixels"}
SHORT = 20
# After 20 epochs more d are needed than after 100: in a trial a seed had 0.871 at 800, and 0.834 at 500.
GRID = (600, 850, 1200, 1700)
PROJECTIONS = {
    f"projection-{kind}": Asked(projection=kind, grid=grid, epochs=SHORT)
    for kind, grid in {
        "fastfood-blocks": GRID,
        "uni": GRID,
        "sparse-global": (*GRID, 2400),  # at 1,700 the upper end of its interval was open
        "dense": GRID,
    }.items()
}
MEASUREMENTS = {
    "fc": Asked(start=600),
    "lenet": Asked("mnist-lenet", start=300),
    "fc-shuffled": Asked(options=SHUFFLED, grid=GRID, epochs=SHORT),
    "lenet-short": Asked("mnist-lenet", start=300, epochs=SHORT),
    "lenet-shuffled": Asked("mnist-lenet", SHUFFLED, start=600, epochs=SHORT),
    **PROJECTIONS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dimension")
    asked = parser.parse_args()
    for name in asked.only:
        one(name, asked)


def one(name: str, flags: argparse.Namespace) -> None:
    """One measurement, by both thresholds: the second search adds only the d that the first did not try."""
    asked = MEASUREMENTS[name]
    make = functools.partial(make_problem, asked.task, flags.data, **asked.options)
    epochs = flags.epochs or asked.epochs
    subject = of_problem(
        make, lambda own: dataclasses.replace(own, epochs=epochs), asked.projection, asked.projection_options
    )
    plan = Plan(seeds=flags.seeds, start=asked.start, factor=2, grid=asked.grid, lr=subject.lr, lr_scale="none")
    told_of = protocol_of(subject.about, plan)
    print(f"{name}: {', '.join(f'{key} {value}' for key, value in told_of.items())}", flush=True)
    found, minutes = {}, {}
    began = time.perf_counter()
    with closing(Runs(subject.make, subject.about, flags.out / name, workers=flags.workers, told=tell)) as runs:
        take_baselines(runs, name, flags.out)
        for mode in ("global", "local"):
            own = dataclasses.replace(plan, threshold=Threshold(mode, 0.9))
            found[mode] = measure(runs, subject.D, own, scored=subject.scored, chosen=subject.chosen)
            minutes[mode] = (time.perf_counter() - began) / 60
    label = Told(f"{subject.title} ({name})", subject.metric, subject.split, subject.n, told_of)
    for mode, measured in found.items():
        write_whole(flags.out / name / mode / RESULTS, as_json(result(measured, label)))
    lines = [
        f"{mode} {told(measured)}, first crossing {measured.crossing.first}, after {minutes[mode]:.1f} min"
        for mode, measured in found.items()
    ]
    print(f"{name}: {'; '.join(lines)}", flush=True)


def take_baselines(runs: Runs, name: str, out: Path) -> None:
    """Of projections that are compared, each takes the runs of all parameters that another has trained."""
    for other in PROJECTIONS if name in PROJECTIONS else ():
        if other != name and (out / other / MADE_WITH).exists():
            runs.take(out / other)


def tell(run: Any, outcome: Any) -> None:
    """A line for each run as it ends."""
    what = "all parameters" if run.d is None else f"d {run.d}" if run.d else "θ0"
    print(f"  {what} seed {run.seed}: {outcome.test:.4f} in {outcome.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
