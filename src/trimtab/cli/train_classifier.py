"""trimtab train --task: a classification head with an adapter below it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trimtab.cli.common import Screen, load_model, program
from trimtab.cli.recipe import Recipe, resolved, write_config
from trimtab.cli.training import attach_recipe, fit_run, tell_losses
from trimtab.data.labelled import LabelledRow, class_names, hold_out
from trimtab.tasks import make_task
from trimtab.tasks.nlu import Classification, ClassRecord, Sentences

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.models.classifier import Classifier
    from trimtab.tasks.results import Outcome


def train_classifier(recipe: Recipe, folder: Path, screen: Screen) -> dict[str, Any]:
    """Train as a recipe says, in a run folder. Returns the run's result, also written to result.json."""
    task, rows, held = _sources(recipe, screen)
    loaded: Classifier = load_model(recipe.model, screen, classes=task.classes, seed=recipe.training.seed)
    from trimtab.data.label_batch import pad_labelled
    from trimtab.report.record import write_result
    from trimtab.tasks.classify import encoded
    from trimtab.train.loss import class_loss
    from trimtab.train.metrics import make_logger

    record = ClassRecord(task.name, task.classes, min(recipe.data.max_length, loaded.max_length))
    examples = encoded(task.items_of(rows, task.classes), loaded, record.max_length)
    evaluation = encoded(task.items_of(held, task.classes), loaded, record.max_length) if held else []
    screen.say(f"{sum(len(e.input_ids) for e in examples):,} tokens in {len(examples):,} rows")
    adapter = attach_recipe(recipe, loaded.model, screen, loaded.head)
    adapter.provenance |= record.to_provenance()
    recipe = resolved(recipe, loaded)
    loggers = [make_logger(name, folder) for name in recipe.record.log_to]
    write_config(recipe, folder)
    how: dict[str, Any] = {"loss": class_loss, "build": pad_labelled}
    result = fit_run(recipe, adapter, loaded.tokenizer, examples, evaluation, folder, screen, loggers, **how)
    result |= record.to_provenance() | {"truncated_rows": sum(e.truncated > 0 for e in examples)}
    if held:
        result |= _gains(recipe, loaded, adapter, task.items_of(held, task.classes), record, folder, screen)
    write_result(folder, result)
    return result


def _sources(recipe: Recipe, screen: Screen) -> tuple[Classification, tuple[LabelledRow, ...], tuple[LabelledRow, ...]]:
    """The task with its classes, the rows to train on and those to evaluate on: a wrong file is told at once."""
    flags = recipe.data
    task = cast("Classification", make_task(str(flags.task)))
    path = task.path("train", flags.data)
    rows = task.rows(path, flags.limit)
    task = Classification(task.name, task.classes or class_names(rows, path.name))
    held: tuple[LabelledRow, ...] = ()
    if flags.eval_data:
        held = task.rows(Path(flags.eval_data).expanduser())
    elif flags.hold_out:
        rows, held = hold_out(rows, flags.hold_out, recipe.training.seed)
    counts = ", ".join(f"{sum(row.label == label for row in rows):,} of class {label}" for label in task.classes)
    screen.say(f"{path.name}: {len(rows):,} rows to train on ({counts})")
    if held:
        screen.say(f"{len(held):,} rows to evaluate on")
        _warn_of_overlap(rows, held, screen)
    return task, rows, held


def _warn_of_overlap(rows: Sequence[LabelledRow], held: Sequence[LabelledRow], screen: Screen) -> None:
    seen = {(row.first, row.second) for row in rows}
    double = sum((row.first, row.second) in seen for row in held)
    if double:
        screen.warn(f"{double} of the {len(held)} rows to evaluate on are among those to train on")


def _gains(
    recipe: Recipe,
    loaded: Classifier,
    adapter: Adapter,
    items: Sequence[Sentences],
    record: ClassRecord,
    folder: Path,
    screen: Screen,
) -> dict[str, Any]:
    """The figures of the evaluation rows, before training, below the head as it was drawn, and after.

    The first rows become the samples of the report.
    """
    from trimtab.report.record import write_samples
    from trimtab.tasks.classify import classify
    from trimtab.tasks.figures import gains

    task = Classification(record.task, record.classes)
    with screen.progress("evaluating", "rows") as update:

        def answers(done: int) -> Sequence[Outcome]:
            def told(now: float, _: int) -> None:
                update(done + now, 2 * len(items))

            return classify(loaded, task, items, max_length=record.max_length, progress=told)

        after = answers(0)
        with adapter.disable():
            before = answers(len(items))
    shown = list(zip(items, before, after, strict=True))[: recipe.record.samples]
    if shown:
        write_samples(folder, [_sample(item, str(old.prediction), str(new.prediction)) for item, old, new in shown])
    return gains(task, items, before, after)


def _sample(item: Sentences, before: str, after: str) -> dict[str, str]:
    prompt = item.question if item.second is None else f"{item.question}\n{item.second}"
    return {"prompt": prompt, "expected": item.answer, "before": before, "after": after}


def tell_classifier(result: dict[str, Any], recipe: Recipe, folder: Path, screen: Screen) -> None:
    """What came of it, and what to do next."""
    tell_losses(result, "row", screen)
    if "accuracy" in result:
        found, (low, high) = result["accuracy"], result["accuracy"]["interval_after"]
        screen.outcome(
            f"accuracy {found['after']:.3f} ({low:.3f} to {high:.3f}) on {found['items']:,} rows, always the commonest "
            f"class {found['chance']:.3f}; F1 {result['f1']['after']:.3f}, Matthews {result['matthews']['after']:.3f}"
        )
    screen.outcome(f"adapter: {result['adapter']}")
    model, adapter = (shlex.quote(str(x)) for x in (recipe.model.model, result["adapter"]))
    screen.say(f"next: {program()} report {shlex.quote(str(folder))}")
    screen.say(f"      {program()} eval --model {model} --adapter {adapter} --tasks {recipe.data.task} --data FILE")
