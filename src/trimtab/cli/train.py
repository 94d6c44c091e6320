"""trimtab train: an adapter from a data file."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.common import Screen, load_model, need_tokenizer, new_run, program
from trimtab.cli.data import encode_for_training, encode_rows, read_rows
from trimtab.cli.recipe import DataFlags, Recipe, read_recipe, resolved, same_run, write_config
from trimtab.cli.train_classifier import tell_classifier, train_classifier
from trimtab.cli.training import attach_recipe, fit_run, tell_losses
from trimtab.errors import TrimtabError
from trimtab.files import read_json

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.data.read import Source

SAMPLE_TOKENS = 48  # enough to see the kind of answer; a sample is no measurement


def run(name: str, summary: str, argv: list[str]) -> None:
    """Read the recipe, train, say what came of it."""
    recipe, output = read_recipe(name, summary, argv)
    screen = Screen(output)
    folder = new_run(recipe.run.out, "train", recipe.run.resume)
    if recipe.run.resume and (folder / "config.yaml").exists():
        recipe = same_run(recipe, folder)
    elif recipe.run.resume:
        screen.note(f"nothing to resume in {folder} yet: starting from the beginning")
    result = _finished(folder, screen) if recipe.run.resume else None
    classifies = recipe.data.task is not None
    result = result or (train_classifier if classifies else train)(recipe, folder, screen)
    if classifies:
        tell_classifier(result, recipe, folder, screen)
    else:
        _tell(result, recipe, folder, screen)
    screen.result(result)


def _tell(result: dict[str, Any], recipe: Recipe, folder: Path, screen: Screen) -> None:
    """What came of it, and what to do next."""
    tell_losses(result, "token", screen)
    screen.outcome(f"adapter: {result['adapter']}")
    model, adapter, merged = (shlex.quote(str(x)) for x in (recipe.model.model, result["adapter"], folder / "merged"))
    screen.say(f"next: {program()} report {shlex.quote(str(folder))}")
    screen.say(f"      {program()} merge --model {model} --adapter {adapter} --out {merged}")


def _finished(folder: Path, screen: Screen) -> dict[str, Any] | None:
    """The result of a run that has come to its end, or None: there is something left to do."""
    if not ((folder / "adapter" / "adapter_config.json").exists() and (folder / "result.json").exists()):
        return None
    result = {**read_json(folder / "result.json"), "adapter": str(folder / "adapter")}
    screen.note(f"already finished: step {result['steps']} of {result['steps']}; nothing is left to do")
    return result


def train(recipe: Recipe, folder: Path, screen: Screen) -> dict[str, Any]:
    """Train as a recipe says, in a run folder. Returns the run's result, also written to result.json."""
    source, held_out = read_sources(recipe.data, screen)
    loaded = load_model(recipe.model, screen)
    need_tokenizer(loaded)
    from trimtab.report.record import write_samples
    from trimtab.train.metrics import make_logger

    limit = recipe.data.max_length
    examples = encode_for_training(source, loaded.tokenizer, limit, held_out, screen)
    evaluation = encode_rows(held_out, loaded.tokenizer, limit, screen) if held_out else []
    adapter = attach_recipe(recipe, loaded.model, screen)
    recipe = resolved(recipe, loaded)
    loggers = [make_logger(name, folder) for name in recipe.record.log_to]
    write_config(recipe, folder)
    result = fit_run(recipe, adapter, loaded.tokenizer, examples, evaluation, folder, screen, loggers)
    try:
        if samples := answer_samples(adapter, loaded, held_out or source, recipe.record.samples, screen):
            write_samples(folder, samples)
    except TrimtabError as error:  # the run is done and saved; samples only illustrate it
        screen.warn(f"no samples for the report: {error}")
    return result


def read_sources(flags: DataFlags, screen: Screen) -> tuple[Source, Source | None]:
    """The training and evaluation rows, read before the model is loaded: a wrong file is told at once."""
    source = read_rows(flags.data, screen, layout=flags.layout, split=flags.split, limit=flags.limit)
    screen.say(source.describe())
    if flags.eval_data is None:
        return source, None
    return source, read_rows(flags.eval_data, screen, layout=flags.layout, split=flags.eval_split)


def answer_samples(adapter: Adapter, loaded: Any, source: Source, count: int, screen: Screen) -> list[dict[str, str]]:
    """The last answers of the first conversations that fit the model: as written, and by the model before and after."""
    from trimtab.tasks.generate import encode, generate

    room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    rows: list[Any] = []
    prompts: list[Any] = []
    for row in source.rows if loaded.tokenizer.chat_template else ():
        if len(rows) == count:
            break
        prompt = [dataclasses.asdict(turn) for turn in row.turns[:-1]]
        if prompt and len(encode(loaded.tokenizer, prompt)) + SAMPLE_TOKENS <= room:
            rows.append(row)
            prompts.append(prompt)
    if not rows:
        return []
    with screen.progress("answering samples", "answers") as update:

        def answers(done: int) -> list[str]:
            return generate(
                loaded.model,
                loaded.tokenizer,
                prompts,
                max_new_tokens=SAMPLE_TOKENS,
                progress=lambda now, _: update(done + now, 2 * len(rows)),
            )

        after = answers(0)
        with adapter.disable():
            before = answers(len(rows))
    return [
        {"prompt": prompt[-1]["content"], "expected": row.turns[-1].content, "before": old, "after": new}
        for row, prompt, old, new in zip(rows, prompts, before, after, strict=True)
    ]
