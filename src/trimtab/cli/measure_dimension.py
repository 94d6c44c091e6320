"""trimtab measure dimension: how many directions a task needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.cli.common import Screen, load_libraries, options
from trimtab.cli.measure import show_table
from trimtab.errors import UsageError
from trimtab.options import option
from trimtab.tasks.problems import PROBLEMS, make_problem

if TYPE_CHECKING:
    from trimtab.subspace.problem import Problem, Protocol
    from trimtab.subspace.search import Plan

NOTES = "tasks:\n" + "\n".join(f"  {name:<12} {line}" for name, line in PROBLEMS.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimensionFlags:
    """What to measure, how sure to be, and how each run is trained."""

    task: str = option("digits", "what is to be learned; see below")
    data_dir: str | None = option(None, "folder with the task's files (MNIST's four IDX files)")
    width: int | None = option(None, "of mnist-fc's hidden layers")
    depth: int | None = option(None, "how many hidden layers mnist-fc has")
    shuffle: Literal["none", "pixels", "labels"] = option("none", "of MNIST: a control")
    projection: str = option("fastfood-blocks", "how θ_d becomes θ: dense, sparse, sparse-global, fastfood, ... or uni")
    diagonal: Literal["gaussian", "sign"] = option("gaussian", "G of the Fastfood projections")
    threshold: Literal["local", "global", "absolute"] = option(
        "local", "share of what training all parameters reaches, share of 1, or an accuracy"
    )
    share: float = option(0.9, "the share, or the accuracy of an absolute threshold")
    seeds: int = option(3, "runs at every d: start, projection and order of the data differ")
    grid: str | None = option(None, "try exactly these d, as 100,200,500, instead of searching")
    start: int | None = option(None, "the first d of the search; by default √D")
    resolution: float = option(1.2, "how far apart, as a ratio, the d may be between which the dimension is found")
    lr: float | None = option(None, "of training all parameters; by default the task's")
    lr_scale: Literal["sqrt", "none"] = option("sqrt", "in a subspace: times √(D/d), or as it is, as the papers do")
    rates: str = option("1", "multiples of the learning rate to choose from at every d, as 0.5,1,2")
    epochs: int | None = option(None, "passes over the data; by default the task's")
    batch_size: int | None = option(None, "examples a step; by default the task's")
    l2: float | None = option(None, "weight of the squares of all parameters; by default the task's")
    workers: int | None = option(None, "runs at once, one thread each; by default as many as there are cores")
    out: str | None = option(None, "folder that keeps every run, results.json and report.html; a search there goes on")


def run(name: str, summary: str, argv: list[str]) -> None:
    """Search, print, and write the page."""
    flags, output = options(DimensionFlags, name, summary, argv, NOTES)
    make = _maker(flags)
    screen = Screen(output)
    load_libraries(screen)
    from trimtab.report.dimension_page import result, score_rows, sentences, write_dimension
    from trimtab.report.template import check_plots

    if flags.out is not None:
        check_plots()
    problem = make()
    measured, about = _measured(flags, make, problem, screen)
    rows = [[str(cell) for cell in row] for row in score_rows(measured)]
    show_table(screen, "", ("d", "mean", "each seed", "learning rate"), rows)
    for sentence in sentences(measured, about):
        screen.outcome(sentence)
    told = result(measured, about)
    if flags.out is not None:
        page = write_dimension(measured, about, Path(flags.out))
        screen.outcome(f"report: {page}")
        told["report"] = str(page)
    screen.result(told)


def _maker(flags: DimensionFlags) -> Callable[[], Problem]:
    """Gives the problem, here and in the workers."""
    given: dict[str, Any] = {"width": flags.width, "depth": flags.depth}
    given = {key: value for key, value in given.items() if value is not None}
    if flags.shuffle != "none":
        given["shuffle"] = flags.shuffle
    folder = Path(flags.data_dir) if flags.data_dir is not None else None
    return functools.partial(make_problem, flags.task, folder, **given)


def _measured(flags: DimensionFlags, make: Callable[[], Problem], problem: Problem, screen: Screen) -> Any:
    from trimtab.report.dimension_page import Told
    from trimtab.subspace.projection import make_projection
    from trimtab.subspace.runs import Runs, closing
    from trimtab.subspace.search import measure
    from trimtab.subspace.trainers import about_problem, problem_trainer
    from trimtab.train.machine import cores

    protocol, plan = _protocol(flags, problem), _plan(flags, problem)
    extra = {"diagonal": flags.diagonal} if flags.projection.startswith("fastfood") else {}
    make_projection(flags.projection, problem.sizes, 1, 0, **extra)  # refuses what cannot be before anything is trained
    workers = flags.workers or cores()
    about = about_problem(problem, protocol, flags.projection, extra)
    trainer = functools.partial(problem_trainer, make, protocol, flags.projection, extra)
    folder = Path(flags.out) if flags.out is not None else None
    screen.say(f"{problem.name}: {problem.D:,} parameters, {workers} at a time, {protocol.epochs} epochs a run")
    with screen.progress("training", "runs") as update, closing(Runs(trainer, about, folder, workers=workers)) as runs:
        done: list[str] = []

        def at(text: str) -> None:
            done.append(text)
            update(len(done) - 1, max(10, len(done)), text)

        split = problem.splits[problem.scored]
        measured = measure(
            runs, problem.D, plan, scored=problem.scored, chance=problem.chance, examples=len(split), at=at
        )
    scale = "lr · √(D/d)" if flags.lr_scale == "sqrt" else "lr"
    return measured, Told(problem.name, problem.metric, split.name, {**about, "lr": plan.lr, "lr in a subspace": scale})


def _protocol(flags: DimensionFlags, problem: Problem) -> Protocol:
    given = {"lr": flags.lr, "epochs": flags.epochs, "batch_size": flags.batch_size, "l2": flags.l2}
    return dataclasses.replace(problem.defaults, **{key: value for key, value in given.items() if value is not None})


def _plan(flags: DimensionFlags, problem: Problem) -> Plan:
    from trimtab.subspace.crossing import Threshold
    from trimtab.subspace.search import Plan

    if flags.workers is not None and flags.workers < 1:
        raise UsageError(f"workers is {flags.workers}, but must be at least 1")
    return Plan(
        seeds=flags.seeds,
        threshold=Threshold(flags.threshold, flags.share),
        resolution=flags.resolution,
        start=flags.start,
        grid=tuple(_numbers("grid", flags.grid or "", int)),
        lr=problem.defaults.lr if flags.lr is None else flags.lr,
        lr_scale=flags.lr_scale,
        rates=tuple(_numbers("rates", flags.rates, float)),
    )


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers with commas between them."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"{name} is '{text}', but must be numbers with commas between them") from error
