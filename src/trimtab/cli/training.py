"""From a recipe to a trained adapter in its run folder: what train and demo share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.common import Screen
from trimtab.cli.recipe import Recipe

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.data.encode import Example
    from trimtab.train.loop import StepReport


def attach_recipe(recipe: Recipe, model: Any, screen: Screen) -> Adapter:
    """The recipe's method on its targets, with provenance."""
    import trimtab
    from trimtab.models.dtypes import torch_dtype

    place = recipe.place
    with screen.progress(f"attaching {recipe.method.name}"):
        adapter = trimtab.attach(
            model,
            recipe.method,
            targets=place.targets,
            exclude=place.exclude,
            bias=place.bias,
            extra_modules=place.extra_modules,
            slices=place.parts(),
            seed=recipe.training.seed,
            dtype=torch_dtype(place.adapter_dtype),
        )
    adapter.provenance["base_model"] = recipe.model.model
    return adapter


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
    """The loop with a progress bar. Returns the figures, also written to result.json, and writes layers.json."""
    from trimtab.report.record import training_figures, write_layers, write_result
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
    result = training_figures(adapter, done, folder)
    write_result(folder, result)
    with screen.progress("measuring the change of each layer"):
        write_layers(folder, adapter)
    return result
