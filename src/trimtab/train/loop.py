"""The training loop, one for every method. Read `fit` from top to bottom.

A step's gradient is the mean over the supervised tokens of its examples, whatever the padding, packing or
micro-batching: losses are summed, and divided once by the number of supervised tokens of the whole step.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter
from trimtab.data.batch import Batch, batches, pack, pad
from trimtab.data.encode import Example
from trimtab.errors import TrainingError, UsageError
from trimtab.train.checkpoint import Progress, checkpoints, load_checkpoint, load_weights, save_checkpoint, save_weights
from trimtab.train.loss import causal_loss, mean_loss
from trimtab.train.metrics import Logger, MetricsFile
from trimtab.train.settings import Settings

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a step came to. loss, eval_loss: nats per supervised token. Counters are since the first step.

    grad_norm: before clipping. real_tokens: processed, padding not counted. steps: of the whole run.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    real_tokens: int
    supervised_tokens: int
    seconds: float
    eval_loss: float | None

    @staticmethod
    def of(
        progress: Progress, plan: Plan, loss: float, lr: float, grad_norm: float, eval_loss: float | None
    ) -> StepReport:
        """The report of the step `progress` is at."""
        epoch = progress.step / plan.steps_per_epoch
        counters = progress.real_tokens, progress.supervised_tokens, round(progress.seconds, 3)
        return StepReport(progress.step, plan.steps, epoch, loss, lr, grad_norm, *counters, eval_loss)

    def row(self) -> dict[str, Any]:
        """The line of metrics.jsonl: everything but the run's length, and eval_loss where there was an evaluation."""
        row = dataclasses.asdict(self)
        del row["steps"]
        return row if self.eval_loss is not None else {k: v for k, v in row.items() if k != "eval_loss"}


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a run came to.

    seconds: training time, evaluation included, over all its sessions. real_tokens: processed, padding not counted.
    train_loss: nats per supervised token over the whole run; eval_loss: at the end. peak_rss_bytes: of this process.
    """

    steps: int
    seconds: float
    real_tokens: int
    supervised_tokens: int
    tokens_per_second: float
    train_loss: float
    eval_loss: float | None
    peak_rss_bytes: int
    adapter: str | None


def fit(
    adapter: Adapter,
    examples: Sequence[Example],
    settings: Settings | None = None,
    *,
    eval_examples: Sequence[Example] = (),
    out: str | Path | None = None,
    resume: bool = False,
    pad_id: int = 0,
    loss: Loss = causal_loss,
    on_step: Callable[[StepReport], None] | None = None,
    loggers: Sequence[Logger] = (),
) -> FitResult:
    """Train an adapter; the base is not touched.

    examples: token sequences that say which tokens are targets (`trimtab.data.encode`). out: a run folder for
    metrics.jsonl, checkpoints/ and adapter/; None writes nothing. resume: go on from the newest checkpoint in `out`,
    bit for bit as if never stopped. loss(model, batch): the sum over supervised tokens. Raises TrainingError when a
    loss is not finite or memory runs out; the last good adapter is saved first.
    """
    settings = settings or Settings()
    model, device = adapter.model, next(adapter.model.parameters()).device
    plan = Plan.of(examples, settings, adapter.method.default_lr)
    evaluation = _eval_batches(eval_examples, settings, pad_id)
    parameters, optimizer = adapter.parameters(), _optimizer(adapter, plan.base_lr, settings)
    out = Path(out) if out is not None else None

    with _training_mode(model, settings):
        progress = _resumed(out, adapter, optimizer) if resume else Progress()
        sinks = [*([MetricsFile(out / "metrics.jsonl", progress.step)] if out else []), *loggers]
        eval_loss, started = progress.eval_loss, time.perf_counter() - progress.seconds

        for step in range(progress.step + 1, plan.steps + 1):
            chosen, lr = plan.batch(step), plan.lr(step)
            parts = micro_batches(examples, chosen, settings, pad_id)
            supervised = sum(batch.supervised_tokens for batch in parts)

            step_loss = 0.0
            with _memory_advice(settings):
                for batch in parts:
                    part = loss(model, batch.to(device)) / supervised
                    part.backward()  # type: ignore[no-untyped-call]
                    step_loss += part.item()
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf).item()
            if not math.isfinite(step_loss + norm):
                raise _not_finite(adapter, step, step_loss, norm, [examples[i].row for i in chosen], out)

            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            optimizer.step()
            optimizer.zero_grad()
            adapter.after_step(step)

            progress.add(step, sum(batch.real_tokens for batch in parts), supervised, step_loss)
            if evaluation and plan.evaluates(step):
                eval_loss = progress.eval_loss = mean_loss(model, evaluation)
                _keep_if_best(adapter, progress, out)
            progress.seconds = time.perf_counter() - started
            report = StepReport.of(progress, plan, step_loss, lr, norm, eval_loss if plan.evaluates(step) else None)
            for sink in sinks:
                sink.log(report.row())
            if on_step is not None:
                on_step(report)
            if out is not None and plan.saves(step):
                save_checkpoint(out / "checkpoints", adapter, optimizer, progress)

        for sink in sinks:
            sink.close()
    return _finish(adapter, progress, settings, out)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which examples each step takes and at what rate; from the settings alone, so a resumed run has the same."""

    lengths: tuple[int, ...]
    settings: Settings
    base_lr: float
    steps_per_epoch: int
    steps: int

    @staticmethod
    def of(examples: Sequence[Example], settings: Settings, default_lr: float) -> Plan:
        """UsageError when there is nothing to learn from."""
        if not any(any(example.supervised[1:]) for example in examples):
            raise UsageError(
                f"none of the {len(examples)} examples has a supervised token: there is nothing to train on"
            )
        per_epoch = math.ceil(len(examples) / settings.batch_size)
        steps = max(1, math.ceil(settings.epochs * per_epoch - 1e-9))
        steps = min(steps, settings.max_steps or steps)
        lengths = tuple(len(example.input_ids) for example in examples)
        return Plan(lengths, settings, settings.lr or default_lr, per_epoch, steps)

    def batch(self, step: int) -> list[int]:
        """The examples of optimizer step `step`, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        return self._epoch(epoch)[place]

    def _epoch(self, epoch: int) -> list[list[int]]:
        return batches(self.lengths, self.settings.batch_size, seed=self.settings.seed, epoch=epoch)

    def evaluates(self, step: int) -> bool:
        """Whether the evaluation data is looked at after this step."""
        return step == self.steps or bool(self.settings.eval_every and step % self.settings.eval_every == 0)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        return bool(self.settings.save_every and step % self.settings.save_every == 0)

    def lr(self, step: int) -> float:
        """The learning rate of step `step`: rising linearly in warm-up, then constant, or falling to 0."""
        warm = round(self.settings.warm_up * self.steps)
        if step <= warm:
            return self.base_lr * step / warm
        done = (step - 1 - warm) / max(1, self.steps - warm)
        if self.settings.schedule == "linear":
            return self.base_lr * (1 - done)
        if self.settings.schedule == "cosine":
            return self.base_lr * (1 + math.cos(math.pi * done)) / 2
        return self.base_lr


def _optimizer(adapter: Adapter, lr: float, settings: Settings) -> torch.optim.Optimizer:
    # foreach: one kernel over all parameters instead of a Python loop over hundreds of small ones.
    return torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=settings.weight_decay, foreach=True)


def micro_batches(examples: Sequence[Example], chosen: Sequence[int], settings: Settings, pad_id: int) -> list[Batch]:
    """The examples of one step, as batches of at most `micro_batch`; those with nothing supervised are left out."""
    size = settings.micro_batch or settings.batch_size
    together = pack if settings.packing == "pack" else pad
    useful = [examples[i] for i in chosen if any(examples[i].supervised[1:])]
    return [together(useful[i : i + size], pad_id) for i in range(0, len(useful), size)]


def _eval_batches(examples: Sequence[Example], settings: Settings, pad_id: int) -> list[Batch]:
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    size = settings.batch_size
    groups = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    found = [batch for group in groups for batch in micro_batches(examples, group, settings, pad_id)]
    if examples and not found:
        raise UsageError(f"none of the {len(examples)} evaluation examples has a supervised token")
    return found


@contextmanager
def _training_mode(model: nn.Module, settings: Settings) -> Iterator[None]:
    """Training mode, seeded; the caller's mode and random state come back afterwards."""
    training = model.training
    checkpointing: Any = getattr(model, "gradient_checkpointing_enable", None)
    if settings.gradient_checkpointing and checkpointing is None:
        raise UsageError(f"{type(model).__name__} has no gradient checkpointing: turn it off")
    with torch.random.fork_rng(enabled=True):
        torch.manual_seed(settings.seed)
        model.train()
        if settings.gradient_checkpointing:
            checkpointing(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            if settings.gradient_checkpointing:
                model.gradient_checkpointing_disable()  # type: ignore[operator]
            model.train(training)


@contextmanager
def _memory_advice(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        size = settings.micro_batch or settings.batch_size
        advice = f"micro_batch (now {size}), " if size > 1 else ""
        raise TrainingError(
            f"out of memory: lower {advice}max_length or the rank, or turn on gradient_checkpointing; none but the "
            "rank and max_length changes the result"
        ) from error


def _resumed(out: Path | None, adapter: Adapter, optimizer: torch.optim.Optimizer) -> Progress:
    if out is None:
        raise UsageError("resume needs the run folder: give out")
    found = checkpoints(out / "checkpoints")
    if not found and (out / "adapter").exists():
        raise UsageError(f"{out} is a finished run without checkpoints: there is nothing to resume")
    # A run killed before its first checkpoint starts anew, which comes to the same.
    return load_checkpoint(found[-1], adapter, optimizer) if found else Progress()


def _not_finite(
    adapter: Adapter, step: int, loss: float, norm: float, rows: list[int], out: Path | None
) -> TrainingError:
    # The step was not taken: the weights are those of the step before, and finite.
    kept = f"; the adapter of step {step - 1} is in {adapter.save(out / 'adapter')}" if out is not None else ""
    return TrainingError(
        f"step {step} has loss {loss} and gradient norm {norm} (rows {', '.join(map(str, rows))}){kept}. "
        "Lower the learning rate, use float32, or look at those rows"
    )


def _keep_if_best(adapter: Adapter, progress: Progress, out: Path | None) -> None:
    assert progress.eval_loss is not None
    if progress.best_loss is None or progress.eval_loss < progress.best_loss:
        progress.best_loss, progress.best_step = progress.eval_loss, progress.step
        if out is not None:
            save_weights(out / "best", adapter)


def _finish(adapter: Adapter, progress: Progress, settings: Settings, out: Path | None) -> FitResult:
    eval_loss = progress.eval_loss
    if settings.keep_best and out is not None and progress.best_loss is not None:
        load_weights(out / "best", adapter)
        eval_loss = progress.best_loss
    return FitResult(
        progress.step,
        progress.seconds,
        progress.real_tokens,
        progress.supervised_tokens,
        progress.real_tokens / max(progress.seconds, 1e-9),
        progress.loss_sum / max(1, progress.supervised_tokens),
        eval_loss,
        peak_rss_bytes(),
        str(adapter.save(out / "adapter")) if out is not None else None,
    )


def peak_rss_bytes() -> int:
    """The largest resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
