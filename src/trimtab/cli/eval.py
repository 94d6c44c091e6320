"""trimtab eval: how well a model answers the questions of tasks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from trimtab.cli.answering import ANY_BASE
from trimtab.cli.common import ModelFlags, Screen, load_model, need_tokenizer, options, refuse_unwritable
from trimtab.errors import UsageError
from trimtab.files import write_whole
from trimtab.options import option
from trimtab.tasks import make_task
from trimtab.tasks.nlu import Classification, class_record, refuse_classifiers
from trimtab.tasks.task import Item, Task, WordedTask, subset

if TYPE_CHECKING:
    from trimtab.cli.common import Update
    from trimtab.tasks.figures import Figures
    from trimtab.tasks.nlu import Sentences
    from trimtab.tasks.results import Outcome, Results
    from trimtab.tasks.statistics import Interval

FIGURES = "figures.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalFlags(ModelFlags):
    tasks: tuple[str, ...] = option(help="names of the tasks (trimtab list tasks), also as one,two")
    adapter: str | None = option(None, "the adapter's folder; without one the model itself is asked")
    any_base: bool = option(False, ANY_BASE)
    scoring: Literal["likelihood", "generation"] = option(
        "likelihood", "likelihood takes the most probable choice, generation reads an answer from what the model writes"
    )
    limit: int | None = option(None, "ask so many questions of each task, drawn at random; by default all")
    seed: int = option(0, "of the questions that --limit draws", least=0)
    data: str | None = option(None, "folder of the tasks' files; by default the one that TRIMTAB_DATA names")
    out: str | None = option(None, "folder for the result of each question; the same command again goes on from there")
    batch_size: int = option(8, "questions to one batch")
    max_new_tokens: int = option(32, "longest generated answer in tokens")


Asked = Sequence[tuple[Task, Path, tuple[Item, ...]]]
"""Each task with its file and the questions of it to ask."""


def run(name: str, summary: str, argv: list[str]) -> None:
    """Ask every question of every task, and say what came of it."""
    flags, output = options(EvalFlags, name, summary, argv)
    _check(flags)
    screen = Screen(output)
    asked = _questions(flags, screen)
    loaded = load_model(flags, screen, classes=_classes(asked))
    need_tokenizer(loaded)
    from trimtab.tasks.figures import plain

    results = _prepare(flags, loaded, asked, screen)
    figures = [_ask(flags, loaded, task, items, results, screen) for task, _, items in asked]
    result = {
        "model": flags.model,
        "adapter": flags.adapter,
        "scoring": _scoring(flags, asked),
        "limit": flags.limit,
        "seed": flags.seed,
        "tasks": [plain(row) for row in figures],
        "out": flags.out,
    }
    if flags.out:
        write_whole(Path(flags.out) / FIGURES, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    _show(figures, screen)
    screen.result(result)


def _check(flags: EvalFlags) -> None:
    """UsageError for what cannot be done, before anything is loaded."""
    for key, value in (("batch_size", flags.batch_size), ("max_new_tokens", flags.max_new_tokens)):
        if value < 1:
            raise UsageError(f"{key} is {value}, but must be at least 1")
    if flags.adapter is not None and not Path(flags.adapter).is_dir():
        raise UsageError(f"there is no adapter's folder {flags.adapter}")
    if flags.out is not None:
        if Path(flags.out).is_file():
            raise UsageError(f"{flags.out} is a file, but the results need a folder")
        refuse_unwritable(Path(flags.out))


def _questions(flags: EvalFlags, screen: Screen) -> Asked:
    """What is to be asked: a wrong name or file is told before the model is loaded."""
    names = dict.fromkeys(name for given in flags.tasks for name in given.split(",") if name)
    tasks = _with_classes(flags, [make_task(name) for name in names])
    asked = []
    for task in tasks:
        path = task.path("test", flags.data)
        every = task.read(path)
        items = subset(every, flags.limit, flags.seed)
        drawn = f"{len(items):,} of {len(every):,} questions, drawn at random with seed {flags.seed}"
        screen.say(f"{task.name}: {drawn if len(items) < len(every) else f'{len(items):,} questions'}")
        asked.append((task, path, items))
    return asked


def _with_classes(flags: EvalFlags, tasks: Sequence[Task]) -> list[Task]:
    """The tasks, those of classification with the adapter's classes. UsageError for what does not go together."""
    if not tasks:
        raise UsageError("--tasks names no task (see trimtab list tasks)")
    record = class_record(flags.adapter) if flags.adapter else None
    heads = [task for task in tasks if isinstance(task, Classification)]
    others = [task for task in tasks if not isinstance(task, Classification)]
    if heads and others:
        raise UsageError(
            f"{heads[0].name} asks a trained head and {others[0].name} asks for text: eval them one by one"
        )
    if record and others:
        refuse_classifiers({Path(str(flags.adapter)).name: str(flags.adapter)})
    if heads and flags.scoring != "likelihood":
        raise UsageError(
            f"--scoring is for tasks that are answered in words, and {heads[0].name} is answered by a head"
        )
    if not (heads and record):
        return list(tasks)
    return [dataclasses.replace(task, classes=record.classes) for task in heads]


def _classes(asked: Asked) -> tuple[str, ...]:
    """The classes that the tasks' head tells apart; none for tasks of words. UsageError where tasks have others."""
    if not isinstance(asked[0][0], Classification):
        return ()
    first, *others = [(task.name, items[0].choices) for task, _, items in asked]
    for name, choices in others:
        if choices != first[1]:
            raise UsageError(f"one head cannot have the classes of {first[0]} and of {name}: eval them one by one")
    return first[1]


def _scoring(flags: EvalFlags, asked: Asked) -> str:
    return "classes" if isinstance(asked[0][0], Classification) else flags.scoring


def _prepare(flags: EvalFlags, loaded: Any, asked: Asked, screen: Screen) -> Results | None:
    """The adapter put on the model, and the results there are so far; None where none are kept."""
    import trimtab
    from trimtab.tasks.classify import refuse_random
    from trimtab.tasks.digests import adapter_digest, file_digest, model_digest
    from trimtab.tasks.results import Results, Setup

    base, adapter = model_digest(loaded.model) if flags.out else "", None
    if flags.adapter:
        with screen.progress("loading the adapter"):
            adapter = trimtab.load(loaded.model, flags.adapter, any_base=flags.any_base)
    if isinstance(asked[0][0], Classification):
        refuse_random(loaded, adapter)
    if not flags.out:
        return None
    setup = Setup(
        model=flags.model,
        model_digest=base,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        adapter=flags.adapter,
        adapter_digest=adapter_digest(Path(flags.adapter)) if flags.adapter else None,
        scoring=_scoring(flags, asked),
        max_new_tokens=flags.max_new_tokens if flags.scoring == "generation" else None,
        data={task.name: file_digest(path) for task, path, _ in asked},
    )
    return Results(Path(flags.out), setup)


def _ask(
    flags: EvalFlags, loaded: Any, task: Task, items: tuple[Item, ...], results: Results | None, screen: Screen
) -> Figures:
    from trimtab.tasks.figures import figures

    with screen.progress(task.name, "questions") as update:
        try:
            outcomes = _outcomes(flags, loaded, task, items, results, update)
        except KeyboardInterrupt as stop:
            kept = f"what is done is in {flags.out}, and the same command goes on from there"
            raise KeyboardInterrupt(kept if flags.out else "with --out, what is done would have been kept") from stop
    return figures(task, items, outcomes)


def _outcomes(
    flags: EvalFlags, loaded: Any, task: Task, items: tuple[Item, ...], results: Results | None, update: Update
) -> tuple[Outcome, ...]:
    from trimtab.tasks.classify import classify
    from trimtab.tasks.evaluate import evaluate

    how: dict[str, Any] = {"batch_size": flags.batch_size, "results": results, "progress": update}
    if isinstance(task, Classification):
        record = class_record(flags.adapter) if flags.adapter else None
        length = record.max_length if record else loaded.max_length
        return classify(loaded, task, cast("tuple[Sentences, ...]", items), max_length=length, **how)
    words, length = cast("WordedTask", task), flags.max_new_tokens
    return evaluate(loaded.model, loaded.tokenizer, words, items, scoring=flags.scoring, max_new_tokens=length, **how)


def _show(figures: Sequence[Figures], screen: Screen) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    classes = figures[0].f1 is not None
    columns = ("task", "items", "accuracy", "95% interval", "chance", "majority")
    last = ("F1", "95% interval", "Matthews", "95% interval") if classes else ("unparseable",)
    for column in (*columns, *last):
        table.add_column(column, justify="left" if column == "task" else "right")
    for row in figures:
        table.add_row(
            row.task,
            f"{row.items:,}",
            *_with_interval(row.accuracy, row.interval),
            f"{row.chance:.3f}",
            f"{row.majority:.3f}",
            *_with_interval(row.f1, row.f1_interval),
            *_with_interval(row.matthews, row.matthews_interval),
            *(() if classes else ("-" if row.unparseable is None else f"{row.unparseable:.3f}",)),
        )
    if not (screen.output.quiet and screen.output.json):
        screen.console.print(table)


def _with_interval(value: float | None, interval: Interval | None) -> tuple[str, ...]:
    """The two cells of a figure, none where it was not taken."""
    return () if value is None or interval is None else (f"{value:.3f}", f"{interval.low:.3f} to {interval.high:.3f}")
