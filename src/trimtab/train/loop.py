"""The training loop, one for every method. Read `fit` from top to bottom.

A step's gradient is the mean over the supervised tokens of its examples, whatever the padding, packing or
micro-batching: losses are summed, and divided once by the number of supervised tokens of the whole step.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, state_of
from trimtab.data.batch import Batch, pad
from trimtab.data.encode import Example
from trimtab.errors import UsageError, problems_to_error
from trimtab.train.checkpoint import (
    Progress,
    clear_partial,
    load_newest,
    load_weights,
    run_identity,
    save_checkpoint,
    save_weights,
)
from trimtab.train.guard import (
    LastGood,
    all_finite,
    memory_advice,
    not_finite,
    refuse_examples,
    training_mode,
    warn_of_divergence,
    warn_of_stillness,
)
from trimtab.train.interrupt import between_steps
from trimtab.train.loss import Loss, causal_loss, mean_loss, refuse_not_causal
from trimtab.train.metrics import Logger, MetricsFile
from trimtab.train.packing import Build, packing_for
from trimtab.train.plan import Plan, eval_batches, micro_batches
from trimtab.train.settings import Settings
from trimtab.train.trial import Means, means_for

log = logging.getLogger("trimtab")

AUTOSAVE_SECONDS = 300


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
    train_loss: nats per supervised token over the whole run; eval_loss: at the end, eval_loss_before: before the first
    step, None without evaluation data. peak_rss_bytes: of this process.
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
    eval_loss_before: float | None = None


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
    build: Build = pad,
    on_step: Callable[[StepReport], None] | None = None,
    loggers: Sequence[Logger] = (),
) -> FitResult:
    """Train an adapter; the base is not touched.

    examples: token sequences that say which tokens are targets (`trimtab.data.encode`). out: a run folder for
    metrics.jsonl, checkpoints/ and adapter/; None writes nothing. resume: go on from the newest checkpoint in `out`,
    bit for bit as if never stopped. loss(model, batch): the sum over supervised tokens, in training and evaluation.
    build(examples, pad_id): makes the batches that a loss of one's own reads; what its examples' `targets` count is
    what counts as supervised.
    Raises UsageError for settings, examples, an adapter or a model that do not go together, OutOfMemory, and
    TrainingError when a loss is not finite; the last good adapter is then kept. A first Ctrl-C ends the step and writes
    a checkpoint.
    """
    settings = settings or Settings()
    model = adapter.model
    out = Path(out) if out is not None else None
    _refuse(adapter, settings, examples, eval_examples, out, resume, loss, build)
    useful = [example for example in (*examples, *eval_examples) if example.targets]
    with memory_advice(settings):
        packing = packing_for(adapter, settings.packing, useful, loss, build)
        means = Means(packing)
        if loss is causal_loss:
            means = means_for(model, adapter.parameters(), settings.packing, useful, packing, pad_id)
    packing = means.packing
    log.info("packing: %s, %s", packing.name, packing.reason)
    plan = Plan.of(examples, settings, adapter.method.default_lr, by_length=packing.name == "pad")
    if silent := len(examples) - len(plan.useful):
        log.info("%d of %d examples have no supervised token, and are left out", silent, len(examples))
    evaluation = eval_batches(eval_examples, settings, packing, pad_id)
    parameters, optimizer = adapter.parameters(), _optimizer(adapter, plan.base_lr, settings)
    identity = run_identity(adapter, settings, examples, eval_examples)

    with _set_up(model, settings, means), between_steps(out is not None) as wish:
        progress = _resumed(out, adapter, optimizer, identity) if resume else Progress()
        adapter.prepare(plan.steps)
        good, eval_loss, clock = LastGood(adapter, progress.step), progress.eval_loss, Clock(progress.seconds)
        if evaluation and progress.step == 0:
            progress.eval_loss_before = _evaluated(model, evaluation, loss, "before training", good, out)
        optimizer.zero_grad()
        with _sinks(out, progress.step, loggers) as sinks:
            for step in range(progress.step + 1, plan.steps + 1):
                chosen, lr = plan.batch(step), plan.lr(step)
                parts = micro_batches(examples, chosen, settings, packing, pad_id)
                supervised = sum(batch.supervised_tokens for batch in parts)

                total = _backward(adapter, parts, supervised, loss)
                step_loss, norm = _clipped(parameters, total, settings)
                if not math.isfinite(step_loss + norm):
                    raise good.error(not_finite(step, step_loss, norm, [examples[i].row for i in chosen]), out)
                good.keep(step - 1)

                _update(adapter, optimizer, lr, step)

                progress.add(step, sum(batch.real_tokens for batch in parts), supervised, step_loss, norm)
                warn_of_stillness(progress, step_loss, norm)
                if evaluation and plan.evaluates(step):
                    eval_loss = _evaluated(model, evaluation, loss, f"after step {step}", good, out)
                    progress.eval_loss = eval_loss
                    _keep_if_best(adapter, progress, settings, out)
                progress.seconds = clock.seconds()
                report = StepReport.of(progress, plan, step_loss, lr, norm, eval_loss if plan.evaluates(step) else None)
                for sink in sinks:
                    sink.log(report.row())
                if on_step is not None:
                    on_step(report)
                if out is not None and (plan.saves(step) or wish.to_stop or clock.is_due(settings)):
                    save_checkpoint(out / "checkpoints", adapter, optimizer, progress, identity)
                    clock.saved()
                if wish.to_stop:
                    raise KeyboardInterrupt

    if not all_finite(adapter):
        raise good.error(f"step {plan.steps} leaves weights that are not finite", out)
    warn_of_divergence(progress)
    return _finish(adapter, progress, settings, out)


@contextmanager
def _set_up(model: nn.Module, settings: Settings, means: Means) -> Iterator[None]:
    """The model as training needs it: its mode, leaner layers, attention that takes the batches."""
    with memory_advice(settings), training_mode(model, settings), means.on(model):
        yield


def _backward(adapter: Adapter, parts: Sequence[Batch], supervised: int, loss: Loss) -> Tensor:
    """Add up the gradients of a step's batches. Returns its loss, the mean over its supervised tokens.

    What the method adds to the loss has its gradient taken too, and is not part of what is returned.
    """
    model = adapter.model
    device = next(model.parameters()).device
    losses = []
    for batch in parts:
        part = loss(model, batch.to(device)) / supervised
        part.backward()  # type: ignore[no-untyped-call]
        losses.append(part.detach())
    penalty = adapter.penalty()
    if penalty is not None:
        penalty.backward()  # type: ignore[no-untyped-call]
    return torch.stack(losses).sum()


def _clipped(parameters: Sequence[nn.Parameter], loss: Tensor, settings: Settings) -> tuple[float, float]:
    """Clip the gradients. Returns the step's loss and their norm before."""
    if settings.clip:
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # Read together: the one place where the step waits for the model's device.
    read_loss, read_norm = torch.stack([loss, norm.to(loss)]).tolist()
    return read_loss, read_norm


def _update(adapter: Adapter, optimizer: torch.optim.Optimizer, lr: float, step: int) -> None:
    """One step of the optimizer, and what the method does after it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    optimizer.step()
    for parameter in adapter.after_step(step):
        optimizer.state.pop(parameter, None)
    optimizer.zero_grad()


def _evaluated(
    model: nn.Module, evaluation: Sequence[Batch], loss: Loss, when: str, good: LastGood, out: Path | None
) -> float:
    """The evaluation loss. TrainingError, with the last good adapter kept, when it is not finite."""
    found = mean_loss(model, evaluation, loss)
    if not math.isfinite(found):
        raise good.error(f"the evaluation {when} has loss {found}", out)
    return found


class Clock:
    """The seconds of training over all sessions of a run, and whether a checkpoint is due."""

    def __init__(self, before: float) -> None:
        now = time.perf_counter()
        self._start, self._saved = now - before, now

    def seconds(self) -> float:
        """Seconds of training so far, those before a resumption included."""
        return time.perf_counter() - self._start

    def is_due(self, settings: Settings) -> bool:
        """Whether a run that names no interval of its own has gone long enough without a checkpoint."""
        return settings.save_every is None and time.perf_counter() - self._saved > AUTOSAVE_SECONDS

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved = time.perf_counter()


def _refuse(
    adapter: Adapter,
    settings: Settings,
    examples: Sequence[Example],
    eval_examples: Sequence[Example],
    out: Path | None,
    resume: bool,
    loss: Loss,
    build: Build,
) -> None:
    """UsageError for what would otherwise be ignored, overwritten or wrong."""
    problems = []
    merged = state_of(adapter.model).merged
    if merged is not None:
        problems.append(f"adapter '{merged.names[0]}' is merged into the weights: unmerge it first")
    elif not adapter.enabled:
        problems.append(f"adapter '{adapter.name}' is not enabled, so nothing would be learned: enable it first")
    if any(p.dtype == torch.float16 for p in adapter.parameters()):
        problems.append("float16 parameters overflow in training: attach the adapter in float32 or bfloat16")
    for name in ("eval_every", "keep_best"):
        if getattr(settings, name) and not eval_examples:
            problems.append(f"{name} needs evaluation data: give eval_examples (--eval-data)")
    for name, wanted in (("keep_best", settings.keep_best), ("save_every", settings.save_every), ("resume", resume)):
        if wanted and out is None:
            problems.append(f"{name} needs the run folder: give out")
    if out is not None and not resume and any((out / name).exists() for name in ("metrics.jsonl", "adapter")):
        problems.append(f"{out} holds another run: resume it, or choose another folder")
    if build is not pad and loss is causal_loss:
        problems.append("build is for a loss of one's own: give loss too")
    problems_to_error(problems, "training")
    if loss is causal_loss:
        refuse_not_causal(adapter.model)
        refuse_examples(adapter.model, [*examples, *eval_examples])


def _optimizer(adapter: Adapter, lr: float, settings: Settings) -> torch.optim.Optimizer:
    factors = adapter.lr_factors()
    by_factor: dict[float, list[nn.Parameter]] = {}
    for parameter in adapter.parameters():
        by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    groups = [{"params": own, "lr": lr * factor, "factor": factor} for factor, own in by_factor.items()]
    # fused: one kernel over all parameters, a third of the time that hundreds of small ones take (foreach on a CPU). It
    # takes a parameter and its moments, which a checkpoint keeps contiguous, for laid out alike.
    even = all(parameter.is_contiguous() for own in by_factor.values() for parameter in own)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=even, foreach=not even)


@contextmanager
def _sinks(out: Path | None, last_step: int, loggers: Sequence[Logger]) -> Iterator[list[Logger]]:
    sinks: list[Logger] = [*([MetricsFile(out / "metrics.jsonl", last_step)] if out else []), *loggers]
    with ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        yield sinks


def _resumed(
    out: Path | None, adapter: Adapter, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]
) -> Progress:
    assert out is not None
    clear_partial(out / "checkpoints")
    progress = load_newest(out / "checkpoints", adapter, optimizer, identity)
    if progress is None and (out / "adapter").exists():
        raise UsageError(f"{out} holds an adapter but no checkpoint: there is nothing to resume")
    # A run killed before its first checkpoint starts anew, which comes to the same.
    return progress or Progress()


def _keep_if_best(adapter: Adapter, progress: Progress, settings: Settings, out: Path | None) -> None:
    assert progress.eval_loss is not None
    if not adapter.method.settled(progress.step, adapter.weights()):
        return
    if progress.best_loss is None or progress.eval_loss < progress.best_loss:
        progress.best_loss, progress.best_step = progress.eval_loss, progress.step
        if settings.keep_best and out is not None:
            save_weights(out / "best", adapter)


def _finish(adapter: Adapter, progress: Progress, settings: Settings, out: Path | None) -> FitResult:
    eval_loss = progress.eval_loss
    if settings.keep_best and out is not None:
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
        progress.eval_loss_before,
    )


def peak_rss_bytes() -> int:
    """The largest resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
