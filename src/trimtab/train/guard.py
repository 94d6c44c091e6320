"""What surrounds the loop: the model's mode, memory that runs out, weights that stop being numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.module import modes_kept
from trimtab.data.encode import Example
from trimtab.deltas.layout import original_class
from trimtab.errors import (
    TRIAL_FAILURES,
    OutOfMemory,
    TrainingError,
    UsageError,
    problems_to_error,
    ran_out_of_memory,
)
from trimtab.train.checkpoint import Progress
from trimtab.train.settings import Settings

log = logging.getLogger("trimtab")

DIVERGED = 1.0  # nats per supervised token; noise between steps is seldom as much over the mean of a few


@contextmanager
def training_mode(model: nn.Module, settings: Settings) -> Iterator[None]:
    """Training mode, seeded; the caller's modes, gradient checkpointing and random state come back afterwards."""
    with torch.random.fork_rng(), modes_kept(model), _gradient_checkpointing(model, settings.gradient_checkpointing):
        torch.manual_seed(settings.seed)
        model.train()
        yield


@contextmanager
def _gradient_checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    # Newer versions of transformers call it activation checkpointing, and warn of the older name.
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if not wanted or getattr(model, f"is_{name}", False):
        yield
        return
    hooked = bool(getattr(model, "_require_grads_hooks", None))
    try:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
    except (AttributeError, ValueError) as error:
        raise UsageError(
            f"{original_class(model).__name__} has no gradient checkpointing, or refuses it ({error}): turn it off"
        ) from error
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
        if not hooked:  # for an adapter's sake transformers makes the embeddings' output require a gradient
            getattr(model, "disable_input_require_grads", lambda: None)()


@contextmanager
def memory_advice(settings: Settings) -> Iterator[None]:
    """OutOfMemory, with what to lower, for whatever torch and Python raise when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        size = settings.micro_batch or settings.batch_size
        advice = f"micro_batch (now {size}), " if size > 1 else ""
        raise OutOfMemory(
            f"out of memory: lower {advice}max_length or the rank, or turn on gradient_checkpointing; none but the "
            "rank and max_length changes the result"
        ) from error


def refuse_examples(model: Any, examples: Sequence[Example]) -> None:
    """UsageError for tokens the model has no embedding for, and for examples longer than the positions it learned."""
    examples = [example for example in examples if example.targets]
    if not examples:
        return  # which the plan refuses
    name, problems = original_class(model).__name__, []
    try:
        words = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return
    ids = [(token, example.row) for example in examples for token in (min(example.input_ids), max(example.input_ids))]
    for token, row in (min(ids), max(ids)):
        if not 0 <= token < words:
            problems.append(
                f"row {row} has token {token}, but {name} has embeddings for 0 to {words - 1}: was it made by this "
                "model's tokenizer?"
            )
    longest, row = max((len(example.input_ids), example.row) for example in examples)
    limit = positions_of(model) if not problems else None
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        problems.append(f"row {row} has {longest} tokens, but {name} has positions for {limit}: lower max_length")
    elif made_for is not None and longest > made_for:
        log.warning("row %d has %d tokens, more than the %d that %s was made for", row, longest, made_for, name)
    problems_to_error(problems, "training data")


@torch.no_grad()
def positions_of(model: nn.Module) -> int | None:
    """How many tokens the tables of learned positions serve that a text is read by; None where there is none."""
    read: list[int] = []

    def note(table: Any, *_given: Any) -> None:
        # Some count from behind their padding's place, some from an offset of their own.
        behind_padding = 0 if table.padding_idx is None else table.padding_idx + 1
        read.append(table.num_embeddings - int(getattr(table, "offset", behind_padding)))

    names = {module: path.rpartition(".")[2] for path, module in model.named_modules()}
    tables = [m for m, name in names.items() if isinstance(m, nn.Embedding) and ("position" in name or name == "wpe")]
    hooks = [table.register_forward_hook(note) for table in tables]
    try:
        if tables:
            with modes_kept(model):
                model.eval()
                model(input_ids=torch.tensor([[1]], device=next(model.parameters()).device))
    except TRIAL_FAILURES as error:
        if ran_out_of_memory(error):
            raise
    finally:
        for hook in hooks:
            hook.remove()
    return min(read, default=None)


class LastGood:
    """The adapter's newest weights that are known to give a finite loss, in a copy.

    The weights a step leaves are known to be good only when the next step has computed its loss with them.
    """

    def __init__(self, adapter: Adapter, step: int) -> None:
        self.adapter, self.step, self.known = adapter, step, step == 0
        self._state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}

    @torch.no_grad()
    def keep(self, step: int) -> None:
        """The weights as they are now, after `step` steps, have given a finite loss."""
        own = self.adapter.state_dict()
        torch._foreach_copy_(list(self._state.values()), [own[key] for key in self._state])
        self.step, self.known = step, True

    def error(self, what: str, out: Path | None) -> TrainingError:
        """Put the good weights back into the adapter and, with a run folder, into its file; the error to raise."""
        kept = ""
        if self.known:
            self.adapter.load_state_dict(self._state)
            kept = f"; the last good adapter, of step {self.step}, is " + (
                f"in {self.adapter.save(out / 'adapter')}" if out is not None else "in memory"
            )
        return TrainingError(f"{what}{kept}. Lower the learning rate, or use float32")


def not_finite(step: int, loss: float, norm: float, rows: list[int]) -> str:
    """The sentence on a step whose loss or gradient is no number."""
    what = f"loss {loss}" if not math.isfinite(loss) else f"a finite loss but gradient norm {norm}"
    return f"step {step} has {what} (look at its rows: {', '.join(map(str, rows))})"


def warn_of_stillness(progress: Progress, loss: float, grad_norm: float) -> None:
    """Tell of the first step whose gradient is exactly 0: nothing is learned in it."""
    if grad_norm == 0 and progress.still_steps == 1:
        log.warning("step %d has loss %.3f and a gradient of exactly 0: nothing is learned", progress.step, loss)


def warn_of_divergence(progress: Progress) -> None:
    """Tell of a run that ends well above where it began, or that had steps without a gradient."""
    if progress.still_steps:
        log.warning(
            "the gradient was exactly 0 in %d of %d steps, in which nothing was learned: lower the learning rate",
            progress.still_steps,
            progress.step,
        )
    # A short run's first and last steps are not to be the same ones.
    count = min(len(progress.first_losses), progress.step // 2)
    if not count:
        return
    first, last = (sum(losses) / count for losses in (progress.first_losses[:count], progress.last_losses[-count:]))
    if last > first + DIVERGED:
        log.warning(
            "the run diverged: its training loss was %.3f nats per token in the first %d steps and is %.3f in the "
            "last, so the adapter is likely worse than none. Lower the learning rate",
            first,
            count,
            last,
        )


def all_finite(adapter: Adapter) -> bool:
    """Whether every parameter of the adapter is a number."""
    return all(bool(parameter.isfinite().all()) for parameter in adapter.parameters())
