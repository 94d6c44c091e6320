"""trimtab train: an adapter from a data file."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.common import Screen, load_model, new_run, program
from trimtab.cli.recipe import Recipe, read_recipe, resolved, same_run, write_config
from trimtab.errors import TrimtabError, UsageError

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.data.encode import Example
    from trimtab.data.read import Source
    from trimtab.train.loop import FitResult, StepReport

SAMPLE_TOKENS = 48  # enough to see the kind of answer; a sample is no measurement


def run(name: str, summary: str, argv: list[str]) -> None:
    """Read the recipe, train, say what came of it."""
    recipe, output = read_recipe(name, summary, argv)
    screen = Screen(output)
    folder = new_run(recipe.run.out, "train", recipe.run.resume)
    if recipe.run.resume and (folder / "config.yaml").exists():
        recipe = same_run(recipe, folder)
    elif recipe.run.resume:
        screen.warn(f"nothing to resume in {folder} yet: starting from the beginning")
    result = train(recipe, folder, screen)
    screen.say(
        f"trained in {result['seconds']:.1f} s, {result['tokens_per_second']:.0f} tokens/s, "
        f"loss {result['train_loss']:.3f} nats per token"
        + (f", evaluation {result['eval_loss']:.3f}" if result["eval_loss"] is not None else "")
    )
    screen.say(f"adapter: {result['adapter']}")
    model, adapter, merged = (shlex.quote(str(x)) for x in (recipe.model.model, result["adapter"], folder / "merged"))
    screen.say(f"next: {program()} report {shlex.quote(str(folder))}")
    screen.say(f"      {program()} merge --model {model} --adapter {adapter} --out {merged}")
    screen.result(result)


def train(recipe: Recipe, folder: Path, screen: Screen) -> dict[str, Any]:
    """Train as a recipe says, in a run folder. Returns the run's result, also written to result.json."""
    from trimtab.train.metrics import make_logger

    sources = read_sources(recipe, screen)
    loaded = load_model(recipe.model, screen)
    examples, evaluation = encode_sources(recipe, *sources, loaded.tokenizer, screen)
    adapter = attach_recipe(recipe, loaded.model)
    recipe = resolved(recipe, loaded)
    loggers = [make_logger(name, folder) for name in recipe.run.log_to]
    write_config(recipe, folder)
    result = fit_run(recipe, adapter, loaded.tokenizer, examples, evaluation, folder, screen, loggers)
    try:
        write_samples(folder, adapter, loaded, sources[1] or sources[0], recipe.run.samples, screen)
    except TrimtabError as error:  # the run is done and saved; samples only illustrate it
        screen.warn(f"no samples for the report: {error}")
    return result


def attach_recipe(recipe: Recipe, model: Any) -> Adapter:
    """The recipe's method on its targets, with provenance."""
    import trimtab
    from trimtab.train.machine import DTYPES

    place = recipe.place
    adapter = trimtab.attach(
        model,
        recipe.method,
        targets=place.targets,
        exclude=place.exclude,
        bias=place.bias,
        extra_modules=place.extra_modules,
        slices=place.parts(),
        seed=recipe.training.seed,
        dtype=DTYPES[place.adapter_dtype],
    )
    adapter.provenance["base_model"] = recipe.model.model
    return adapter


def read_sources(recipe: Recipe, screen: Screen) -> tuple[Source, Source | None]:
    """The training and evaluation rows, read before the model is loaded: a wrong file is told at once."""
    from trimtab.data.read import read

    flags = recipe.data
    source = read(flags.data, layout=flags.layout, limit=flags.limit)
    screen.say(source.describe())
    return source, read(flags.eval_data, layout=flags.layout) if flags.eval_data else None


def encode_sources(
    recipe: Recipe, source: Source, against: Source | None, tokenizer: Any, screen: Screen
) -> tuple[list[Example], list[Example]]:
    """The training and evaluation examples, checked; what is wrong stops, what is doubtful is said loudly."""
    from trimtab.data.encode import encode
    from trimtab.data.inspect import inspect

    if tokenizer is None:
        raise UsageError(f"{recipe.model.model} has no tokenizer, so text cannot be read for it")
    limit = recipe.data.max_length
    examples = encode(source, tokenizer, max_length=limit)
    found = inspect(source, examples, tokenizer, max_length=limit, against=against)
    for warning in found.warnings:
        screen.warn(warning)
    if found.errors:
        raise UsageError(f"{recipe.data.data}: {'; '.join(found.errors)}")
    screen.say(f"{found.tokens:,} tokens, {found.supervised_tokens:,} of them supervised")
    return examples, encode(against, tokenizer, max_length=limit) if against else []


def fit_run(
    recipe: Recipe,
    adapter: Adapter,
    tokenizer: Any,
    examples: list[Example],
    evaluation: list[Example],
    folder: Path,
    screen: Screen,
    loggers: list[Any],
) -> dict[str, Any]:
    """The loop with a progress bar; writes result.json."""
    from trimtab.files import write_whole
    from trimtab.train.loop import fit

    with screen.progress("training", "steps") as update:

        def on_step(report: StepReport) -> None:
            update(report.step, report.steps, f", loss {report.loss:.2f}")

        try:
            done = fit(
                adapter,
                examples,
                recipe.training,
                eval_examples=evaluation,
                out=folder,
                resume=recipe.run.resume,
                pad_id=tokenizer.pad_token_id or 0,
                on_step=on_step,
                loggers=loggers,
            )
        except KeyboardInterrupt as stop:
            again = f"trimtab train --out {shlex.quote(str(folder))} --resume"
            raise KeyboardInterrupt(f"go on with {again}") from stop
    result = describe(recipe, adapter, done, folder)
    write_whole(folder / "result.json", json.dumps(result, indent=2) + "\n")
    write_whole(folder / "layers.json", json.dumps(layer_changes(adapter)) + "\n")
    return result


def write_samples(folder: Path, adapter: Adapter, loaded: Any, source: Source, count: int, screen: Screen) -> None:
    """samples.jsonl: the last answers of the first conversations, as written, and by the model before and after."""
    from trimtab.files import write_whole
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
        return
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
    lines = [
        {"prompt": prompt[-1]["content"], "expected": row.turns[-1].content, "before": old, "after": new}
        for row, prompt, old, new in zip(rows, prompts, before, after, strict=True)
    ]
    write_whole(folder / "samples.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def layer_changes(adapter: Adapter) -> list[dict[str, Any]]:
    """‖ΔW‖/‖W‖ of every adapted weight."""
    import torch

    rows = []
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            weight: Any = adapter.sites[path].weight
            change = delta.weight_change(weight).norm() / weight.float().norm()
            rows.append({"name": path, "relative_change": change.item()})
    return rows


def describe(recipe: Recipe, adapter: Adapter, done: FitResult, folder: Path) -> dict[str, Any]:
    """The figures of a run, and what they depend on."""
    import platform

    import torch
    import transformers

    import trimtab

    model = adapter.model
    own = {id(p) for p in adapter.parameters()}
    return {
        **dataclasses.asdict(done),
        "run": str(folder),
        "model": recipe.model.model,
        "method": recipe.method.options(),
        "adapted_modules": len(adapter.deltas),
        "trainable_parameters": sum(p.numel() for p in adapter.parameters()),
        "base_parameters": sum(p.numel() for p in model.parameters() if id(p) not in own),
        "dtype": str(next(p for p in model.parameters() if id(p) not in own).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "trimtab": trimtab.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
