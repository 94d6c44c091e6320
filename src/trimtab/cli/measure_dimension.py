"""trimtab measure dimension: how many directions a task needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.common import Screen, find_model, load_libraries, options
from trimtab.cli.dimension_flags import DimensionFlags, is_file, projection_of, rates_of, refuse_idle
from trimtab.cli.measure import show_table
from trimtab.errors import UsageError
from trimtab.files import refuse_unwritable
from trimtab.tasks import TASKS
from trimtab.tasks.nlu import KNOWN
from trimtab.tasks.problems import PROBLEMS, make_problem

if TYPE_CHECKING:
    from trimtab.report.dimension_results import Measurement, Told, Unmeasured
    from trimtab.report.direction_tables import Table
    from trimtab.subspace.measured import Measured
    from trimtab.subspace.plan import Plan
    from trimtab.subspace.sentences import Setting
    from trimtab.subspace.subject import Subject
    from trimtab.tasks.problem import Problem, Protocol

NOTES = "tasks:\n" + "\n".join(
    f"  {name:<12} {line}"
    for name, line in {**PROBLEMS, **{name: f"with --model: {TASKS[name].what}" for name in KNOWN}}.items()
)


def run(name: str, summary: str, argv: list[str]) -> None:
    """Search, print, and write the page."""
    flags, output = options(DimensionFlags, name, summary, argv, NOTES)
    refuse_idle(flags)
    flags = _at_home(flags)
    screen = Screen(output)
    load_libraries(screen)
    from trimtab.report.dimension_results import refuse_foreign
    from trimtab.report.template import check_plots

    if flags.out is not None:
        check_plots()
        refuse_unwritable(Path(flags.out))
        refuse_foreign(Path(flags.out), "comparison" if flags.compare else "series" if flags.checkpoints else "search")
    if flags.compare or flags.checkpoints:
        screen.result(_comparison(flags, screen) if flags.compare else _series(flags, screen))
        return
    from trimtab.report.dimension_page import score_table, write_dimension
    from trimtab.report.dimension_results import result, sentences

    subject = _read(flags, "the task", screen)
    measured, about = _one(flags, subject, screen)
    _show(score_table(measured), sentences(measured, about), screen)
    told = result(measured, about)
    if flags.out is not None:
        page = write_dimension(measured, about, Path(flags.out))
        screen.outcome(f"report: {page}")
        told["report"] = str(page)
    screen.result(told)


def _at_home(flags: DimensionFlags) -> DimensionFlags:
    """With ~ in --out and --reuse as the home that it stands for."""
    out, reuse = (None if given is None else str(Path(given).expanduser()) for given in (flags.out, flags.reuse))
    return dataclasses.replace(flags, out=out, reuse=reuse)


def _one(flags: DimensionFlags, subject: Subject, screen: Screen) -> tuple[Measured, Told]:
    from trimtab.report.dimension_results import Told, protocol_of

    plan = _plan(flags, subject)
    measured = _measured(flags, subject, plan, screen)
    protocol = protocol_of(subject.about, plan)
    return measured, Told(subject.title, subject.metric, subject.split, subject.n, protocol, subject.features)


def _series(flags: DimensionFlags, screen: Screen) -> dict[str, Any]:
    """Every checkpoint in a folder of its own within --out; then what the series comes to."""
    from trimtab.report.dimension_comparison import comparison_table, series_results, write_series
    from trimtab.report.dimension_results import Unmeasured
    from trimtab.subspace.judged import NoDimension
    from trimtab.subspace.runs import refuse_other_search
    from trimtab.subspace.series import checkpoints_of, refuse_other_shapes

    given, steps = checkpoints_of(flags.checkpoints)
    own = {label: dataclasses.replace(flags, model=model, checkpoints=()) for label, model in given.items()}
    subjects = {label: _read(own[label], label, screen) for label in own}
    refuse_other_shapes({label: subject.shapes for label, subject in subjects.items()})
    for label, subject in subjects.items():  # before the first of them is trained
        if flags.out is not None:
            refuse_other_search(Path(flags.out) / label, subject.about)
    if flags.reuse is not None:
        for label in _without_runs(Path(flags.reuse), subjects):
            screen.warn(f"{flags.reuse} holds no runs of {label}: all of its own are trained")
            own[label] = dataclasses.replace(own[label], reuse=None)
    series = [
        _checkpoint(own[label], subject, label, steps.get(label, place), screen)
        for place, (label, subject) in enumerate(subjects.items())
    ]
    missing = [one for one in series if isinstance(one, Unmeasured)]
    if len(missing) == len(series):
        told = "; ".join(f"{one.label}: {one.told}" for one in missing)
        raise NoDimension("none measured", f"none of the checkpoints can be measured: {told}")
    title = f"{Path(flags.task).name}, {flags.mode.upper()}"
    results = series_results(series, title)
    _show(comparison_table(series), results["sentences"], screen)
    if flags.out is not None:
        page = write_series(series, title, "step of pretraining" if steps else "checkpoint", Path(flags.out))
        screen.outcome(f"report: {page}")
        results["report"] = str(page)
    return results


def _without_runs(reuse: Path, subjects: Mapping[str, Subject]) -> list[str]:
    """Checkpoints of which the folder of an earlier series holds no runs. UsageError where that is all of them, and for
    runs that were trained otherwise."""
    from trimtab.subspace.runs import MADE_WITH, refuse_unlike

    missing = [label for label in subjects if not (reuse / label / MADE_WITH).exists()]
    if len(missing) == len(subjects):
        raise UsageError(f"{reuse} holds the runs of none of these checkpoints: {', '.join(subjects)}")
    for label, subject in subjects.items():
        if label not in missing:
            refuse_unlike(reuse / label, subject.about)
    return missing


def _checkpoint(
    flags: DimensionFlags, subject: Subject, label: str, at: int, screen: Screen
) -> Measurement | Unmeasured:
    """One of a series, in a folder of its own within --out; without a threshold, the series goes on."""
    from trimtab.report.dimension_page import PAGE, write_dimension
    from trimtab.report.dimension_results import RESULTS, Measurement, Unmeasured
    from trimtab.subspace.judged import NoDimension

    within, reuse = (str(Path(folder) / label) if folder is not None else None for folder in (flags.out, flags.reuse))
    try:
        measured, about = _one(dataclasses.replace(flags, out=within, reuse=reuse), subject, screen)
    except NoDimension as error:
        screen.warn(f"{label} is not measured: {error}")
        if within is not None:  # what stands there is of an earlier threshold
            for name in (RESULTS, PAGE):
                (Path(within) / name).unlink(missing_ok=True)
        return Unmeasured(label, at, subject.title, subject.D, error.reason, str(error))
    if within is not None:
        write_dimension(measured, about, Path(within))
    return Measurement(label, at, measured, about)


def _comparison(flags: DimensionFlags, screen: Screen) -> dict[str, Any]:
    """Earlier measurements side by side."""
    from trimtab.report.dimension_comparison import comparison_results, comparison_table, write_comparison
    from trimtab.report.dimension_results import read_measurements

    several = read_measurements(flags.compare)
    results = comparison_results(several)
    _show(comparison_table(several), results["sentences"], screen)
    if flags.out is not None:
        page = write_comparison(several, Path(flags.out))
        screen.outcome(f"report: {page}")
        results["report"] = str(page)
    return results


def _show(table: Table, sentences: Sequence[str], screen: Screen) -> None:
    show_table(screen, table.title, table.head, table.rows)
    for sentence in sentences:
        screen.outcome(sentence)


def _read(flags: DimensionFlags, what: str, screen: Screen) -> Subject:
    """What is measured; a model of a hub's is fetched first, with the hub's own bars, once its task can be read."""
    if flags.model is not None:
        from trimtab.subspace.sentences import read_splits

        read_splits(_setting(flags, flags.model))
        find_model(flags.model, screen, trust_remote_code=False, kind="classifier")
    with screen.progress(f"reading {what}"):
        return _subject(flags)


def _subject(flags: DimensionFlags) -> Subject:
    from trimtab.subspace.subject import of_problem, of_sentences

    if flags.model is not None:
        return of_sentences(_setting(flags, flags.model))
    return of_problem(_maker(flags), functools.partial(_protocol, flags), projection_of(flags), _drawn(flags))


def _drawn(flags: DimensionFlags) -> dict[str, Any]:
    """Options of the projection."""
    return {"diagonal": flags.diagonal} if projection_of(flags).startswith("fastfood") else {}


def _setting(flags: DimensionFlags, model: str) -> Setting:
    from trimtab.subspace.sentences import Setting

    own = is_file(flags.task)
    if own and flags.data_dir is not None:
        raise UsageError(f"--data-dir is for a task with files of its own, but {flags.task} is a file: leave it out")
    given: dict[str, Any] = {"epochs": flags.epochs, "batch_size": flags.batch_size}
    return Setting(
        model,
        "classification" if own else flags.task,
        flags.task if own else flags.data_dir,
        flags.test_data,
        pretrained=not flags.random_weights,
        mode=flags.mode,
        layers=None if flags.layers == "block" else flags.layers,
        projection=projection_of(flags),
        options=_drawn(flags),
        rows=flags.rows,
        test_rows=flags.test_rows,
        **{key: value for key, value in given.items() if value is not None},
    )


def _maker(flags: DimensionFlags) -> Callable[[], Problem]:
    """Gives the problem, here and in the workers."""
    given: dict[str, Any] = {"width": flags.width, "depth": flags.depth}
    given = {key: value for key, value in given.items() if value is not None}
    if flags.shuffle != "none":
        given["shuffle"] = flags.shuffle
    folder = Path(flags.data_dir) if flags.data_dir is not None else None
    return functools.partial(make_problem, flags.task, folder, **given)


def _protocol(flags: DimensionFlags, defaults: Protocol) -> Protocol:
    given: dict[str, Any] = {"lr": flags.lr, "epochs": flags.epochs, "batch_size": flags.batch_size, "l2": flags.l2}
    return dataclasses.replace(defaults, **{key: value for key, value in given.items() if value is not None})


def _measured(flags: DimensionFlags, subject: Subject, plan: Plan, screen: Screen) -> Measured:
    from trimtab.subspace.runs import Runs
    from trimtab.subspace.search import measure
    from trimtab.train.machine import cores

    workers = flags.workers or cores()
    folder = Path(flags.out) if flags.out is not None else None
    screen.say(f"{subject.title}: {subject.D:,} parameters, {workers} at a time")
    with screen.progress("training", "runs") as update:
        done, what = 0, ""

        def at(text: str) -> None:
            nonlocal what
            what = f" {text}"
            update(done, None, what)

        def told(*_: Any) -> None:
            nonlocal done
            done += 1
            update(done, None, what)

        with closing(Runs(subject.make, subject.about, folder, workers=workers, told=told)) as runs:
            if flags.reuse is not None:
                runs.take(Path(flags.reuse))
            try:
                return measure(
                    runs,
                    subject.D,
                    plan,
                    scored=subject.scored,
                    chosen=subject.chosen,
                    least=subject.least,
                    most=subject.most,
                    at=at,
                )
            except KeyboardInterrupt as stop:
                kept = f"the runs that ended are in {folder}, and the same command goes on from there"
                raise KeyboardInterrupt(kept if folder else "with --out, they would have been kept") from stop


def _plan(flags: DimensionFlags, subject: Subject) -> Plan:
    from trimtab.subspace.crossing import Threshold
    from trimtab.subspace.plan import Plan

    if flags.workers is not None and flags.workers < 1:
        raise UsageError(f"workers is {flags.workers}, but must be at least 1")
    rates, rates_at = rates_of(flags)
    return Plan(
        seeds=flags.seeds,
        threshold=Threshold(flags.threshold, flags.share),
        resolution=flags.resolution,
        start=flags.start,
        grid=() if flags.grid is None else _grid(flags.grid, subject),
        lr=subject.lr if flags.lr is None else flags.lr,
        lr_scale=flags.lr_scale,
        rates=tuple(_numbers("rates", rates, float)),
        rates_at=rates_at,
    )


def _grid(text: str, subject: Subject) -> tuple[int, ...]:
    """Numbers, or those of a paper that can be trained."""
    from trimtab.subspace.crossing import GRIDS

    if text not in GRIDS:
        found = tuple(_numbers("grid", text, int, f", or {' or '.join(GRIDS)}"))
    else:
        found = tuple(d for d in GRIDS[text] if subject.least <= d <= subject.most)
    if not found:
        raise UsageError(f"grid is '{text}', in which there is no d from {subject.least} to {subject.most:,}")
    return found


def _numbers(name: str, text: str, kind: Callable[[str], Any], otherwise: str = "") -> list[Any]:
    """Numbers with commas between them."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"{name} is '{text}', but must be numbers with commas between them{otherwise}") from error
