"""From a recipe to a trained adapter in its run folder: what train and demo share."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.common import Screen, program
from trimtab.cli.recipe import Recipe

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter
    from trimtab.data.encode import Example
    from trimtab.train.loop import FitResult, StepReport


def attach_recipe(recipe: Recipe, model: Any, screen: Screen, head: Sequence[str] = ()) -> Adapter:
    """The recipe's method on its targets, with provenance. head: paths of modules that are trained whole besides."""
    import trimtab
    from trimtab.models.dtypes import torch_dtype

    place = recipe.place
    with screen.progress(f"attaching {recipe.method.name}", "weights") as update:
        adapter = trimtab.attach(
            model,
            recipe.method,
            targets=place.targets or None,
            exclude=place.exclude,
            bias=place.bias,
            extra_modules=tuple(dict.fromkeys([*place.extra_modules, *head])),
            slices=place.parts(),
            seed=recipe.training.seed,
            dtype=torch_dtype(place.adapter_dtype),
            progress=update,
        )
    adapter.provenance["base_model"] = recipe.model.model
    return adapter


def fit_run(
    recipe: Recipe,
    adapter: Adapter,
    tokenizer: Any,
    examples: Sequence[Example],
    evaluation: Sequence[Example],
    folder: Path,
    screen: Screen,
    loggers: list[Any],
    **how: Any,
) -> dict[str, Any]:
    """The loop with a progress bar. Returns the figures, also written to result.json, and writes layers.json.

    how: the loss and its batches, as `fit` takes them, where it is not that of causal models. The warnings told so far
    are among the figures: a result that is doubtful must say so wherever it is read.
    """
    from trimtab.train.loop import fit

    reached, steps = _extent(recipe, adapter, examples, folder)
    if reached:
        screen.note(f"going on from step {reached} of {steps}")
    else:
        with screen.progress(f"preparing {adapter.method.name}", "weights") as update:
            adapter.prepare(steps, update)
    with screen.progress("training", "steps") as update:
        update(reached, steps)

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
                **how,
            )
        except KeyboardInterrupt as stop:
            again = f"{program()} train --out {shlex.quote(str(folder))} --resume"
            raise KeyboardInterrupt(f"go on with {again}") from stop
    return _record(adapter, done, folder, screen)


def _record(adapter: Adapter, done: FitResult, folder: Path, screen: Screen) -> dict[str, Any]:
    from trimtab.report.record import training_figures, write_layers, write_result

    result = {**training_figures(adapter, done, folder), "warnings": list(screen.warnings)}
    write_result(folder, result)
    with screen.progress("measuring the change of each layer"):
        write_layers(folder, adapter)
    return result


def _extent(recipe: Recipe, adapter: Adapter, examples: Sequence[Example], folder: Path) -> tuple[int, int]:
    """The step that the newest checkpoint was written after, 0 without one, and the steps of the whole run."""
    from trimtab.train.checkpoint import checkpoints
    from trimtab.train.plan import Plan

    steps = Plan.of(examples, recipe.training, adapter.method.default_lr).steps
    found = checkpoints(folder / "checkpoints") if recipe.run.resume else []
    return (int(found[-1].name.removeprefix("step-")) if found else 0), steps


def tell_losses(result: dict[str, Any], unit: str, screen: Screen) -> None:
    """What training came to. unit: what a loss is the mean over, token or row."""
    screen.outcome(
        f"trained in {result['seconds']:.1f} s, {result['tokens_per_second']:.0f} tokens/s, "
        f"loss {result['train_loss']:.3f} nats per {unit}"
        + (f", evaluation {result['eval_loss']:.3f}" if result["eval_loss"] is not None else "")
        + (f" ({before:.3f} before training)" if (before := result.get("eval_loss_before")) is not None else "")
    )
