"""The equivalences trimtab rests on, shown on the user's own machine and model with the differences found."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trimtab
from trimtab.adapt.adapter import Adapter
from trimtab.data.batch import pad
from trimtab.data.encode import Example
from trimtab.deltas.delta import Delta
from trimtab.deltas.method import Method
from trimtab.models.fused import fused
from trimtab.ops.products import NARROW
from trimtab.train.loop import fit
from trimtab.train.loss import causal_loss
from trimtab.train.packing import packing_for
from trimtab.train.plan import micro_batches
from trimtab.train.settings import Settings

ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest relative difference by dtype: sums in another order round differently, by a few units of the last place. In a
narrow dtype rounding alone may be more than that, by the model; see `rounding`."""
MOST = 0.3
"""No more is allowed, however coarse the dtype: a batch whose examples see one another is 0.7 off."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One equivalence. difference: relative, unless allowed is 0: then every bit must be the same."""

    name: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed


def tiny_model() -> nn.Module:
    """A random Llama of two layers, for a check of the machine alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model.eval()


def selftest(model: nn.Module, method: Method, on_check: Callable[[Check], None] | None = None) -> list[Check]:
    """Run every check with `method` on `model`, which ends as it began."""
    examples = _examples(model)
    dtype = next(model.parameters()).dtype
    gradients = logits = ALLOWED[dtype]
    if dtype in NARROW:
        off = rounding(model, method, examples)
        # Twice, since two results may be off to opposite sides; what is not finite allows nothing.
        gradients = min(max(gradients, 2 * off), MOST) if math.isfinite(off) else gradients
    done = []
    for check in CHECKS:
        name = (check.__doc__ or "").strip().splitlines()[0].rstrip(".")
        with tempfile.TemporaryDirectory() as folder:
            difference, exact = check(model, method, examples, Path(folder))
        allowed = 0.0 if exact else logits if check in OF_LOGITS else gradients
        done.append(Check(name, difference, allowed))
        if on_check is not None:
            on_check(done[-1])
    return done


Outcome = tuple[float, bool]


def _examples(model: nn.Module) -> list[Example]:
    """Twelve seeded sequences of several lengths, the second half of each supervised; four begin alike."""
    draw, config = random.Random(0), model.config.get_text_config()  # type: ignore[union-attr,operator]
    begin = [[draw.randrange(config.vocab_size) for _ in range(5)] for _ in range(3)]
    examples = []
    for row, length in enumerate([7, 23, 12, 31, 9, 18, 26, 14, 11, 29, 8, 20]):
        ids = [*begin[row % 3], *(draw.randrange(config.vocab_size) for _ in range(length - 5))]
        examples.append(Example(ids, [i >= length // 2 for i in range(length)], row + 1, 0, False))
    return examples


@contextmanager
def _trained(model: nn.Module, method: Method, seed: int = 0) -> Iterator[Adapter]:
    """An adapter with every parameter away from zero, so that each has a gradient."""
    adapter = trimtab.attach(model, method, name="selftest", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
    try:
        yield adapter
    finally:
        adapter.remove()


def _gradient(adapter: Adapter, examples: Sequence[Example], settings: Settings) -> Tensor:
    packing = packing_for(adapter, settings.packing, examples)
    batches = micro_batches(examples, range(len(examples)), settings, packing)
    supervised = sum(batch.supervised_tokens for batch in batches)
    device = next(adapter.model.parameters()).device
    with packing.on(adapter.model):
        for batch in batches:
            (causal_loss(adapter.model, batch.to(device)) / supervised).backward()  # type: ignore[no-untyped-call]
    flat = torch.cat([p.grad.flatten().double() for p in adapter.parameters() if p.grad is not None])
    for parameter in adapter.parameters():
        parameter.grad = None
    return flat


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def rounding(model: nn.Module, method: Method, examples: list[Example]) -> float:
    """How far the plain gradient is from that of the same model in fp32, relative: what its dtype costs anyone.

    Holds the model in both dtypes at once.
    """
    one_by_one = Settings(batch_size=len(examples), packing="pad", micro_batch=1)
    with _trained(model, method) as adapter:
        _make_plain(adapter)
        own = _gradient(adapter, examples, one_by_one)
        with _in_fp32(model):
            return _relative(own, _gradient(adapter, examples, one_by_one))


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """Within the block every parameter and buffer has its values in fp32."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in NARROW]
    before = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def _make_plain(adapter: Adapter) -> None:
    """Compute every delta by its definition, W + ΔW."""
    for delta in adapter.deltas.values():
        vars(delta)["forward"] = functools.partial(Delta.forward, delta)


def packed(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Packed equals unpacked: the gradient of one packed row and of padded rows."""
    whole = Settings(batch_size=len(examples), packing="pad")
    with _trained(model, method) as adapter:
        padded = _gradient(adapter, examples, whole)
        return _relative(_gradient(adapter, examples, dataclasses.replace(whole, packing="pack")), padded), False


def shared(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Shared prefixes equal separate ones: the gradient as training packs it and of examples one by one."""
    whole = Settings(batch_size=len(examples))
    with _trained(model, method) as adapter:
        one_by_one = _gradient(adapter, examples, dataclasses.replace(whole, packing="pad", micro_batch=1))
        return _relative(_gradient(adapter, examples, whole), one_by_one), False


def without_logits(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Loss in blocks equals loss of all logits: the gradient from hidden states and by the model's own logits."""
    batch = pad(examples, 0).to(next(model.parameters()).device)
    with _trained(model, method) as adapter:
        ours = torch.autograd.grad(causal_loss(model, batch), adapter.parameters())
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        chosen = logits.logits.flatten(0, 1)[batch.predictors].float()
        plain = torch.autograd.grad(cross_entropy(chosen, batch.targets, reduction="sum"), adapter.parameters())
    flat = [torch.cat([gradient.flatten().double() for gradient in found]) for found in (ours, plain)]
    return _relative(*flat), False


def fast(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Fast equals plain: the gradient of the method's own forward and of W + ΔW."""
    whole = Settings(batch_size=len(examples), packing="pad")
    with _trained(model, method) as adapter:
        own = _gradient(adapter, examples, whole)
        _make_plain(adapter)
        return _relative(own, _gradient(adapter, examples, whole)), False


def leaner(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Leaner layers equal the model's own: the gradient with the norms and rotations of training, and without."""
    whole = Settings(batch_size=len(examples), packing="pad")
    with _trained(model, method) as adapter:
        own = _gradient(adapter, examples, whole)
        with fused(model):
            return _relative(_gradient(adapter, examples, whole), own), False


def alone(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Padded equals alone: the gradient of one batch and of examples one by one."""
    whole = Settings(batch_size=len(examples), packing="pad")
    with _trained(model, method) as adapter:
        one_by_one = _gradient(adapter, examples, dataclasses.replace(whole, micro_batch=1))
        return _relative(_gradient(adapter, examples, whole), one_by_one), False


def accumulated(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Accumulated equals one batch: micro-batches of 5 and the whole batch."""
    whole = Settings(batch_size=len(examples))
    with _trained(model, method) as adapter:
        parts = _gradient(adapter, examples, dataclasses.replace(whole, micro_batch=5))
        return _relative(parts, _gradient(adapter, examples, whole)), False


class _Stopped(Exception):
    """Stands for whatever interrupts a run."""


def _run(
    model: nn.Module,
    method: Method,
    examples: list[Example],
    out: Path,
    stop_after: int | None = None,
    resume: bool = False,
) -> list[Tensor]:
    settings = Settings(batch_size=3, epochs=1.5, lr=1e-3, schedule="linear", save_every=2, seed=7)

    def on_step(report: Any) -> None:
        if report.step == stop_after:
            raise _Stopped

    adapter = trimtab.attach(model, method, name="selftest", seed=settings.seed)
    try:
        fit(adapter, examples, settings, out=out, resume=resume, on_step=on_step)
        return [tensor.clone() for tensor in adapter.state_dict().values()]
    finally:
        adapter.remove()


def _largest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


def resumed(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Resumed equals uninterrupted: a run stopped after 3 steps and gone on with."""
    whole = _run(model, method, examples, folder / "whole")
    with suppress(_Stopped):
        _run(model, method, examples, folder / "stopped", stop_after=3)
    return _largest(_run(model, method, examples, folder / "stopped", resume=True), whole), True


def seeded(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Seeded twice is identical: two runs from the same seed."""
    first = _run(model, method, examples, folder / "first")
    return _largest(_run(model, method, examples, folder / "second"), first), True


def _outputs(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        rows = [model(torch.tensor([e.input_ids], device=device)).logits.flatten().double() for e in examples[:4]]
    return torch.cat(rows)


def merged(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Merged equals unmerged: the logits of W + ΔW and of the adapter."""
    with _trained(model, method) as adapter:
        kept = _outputs(model, examples)
        trimtab.merge(adapter)
        difference = _relative(_outputs(model, examples), kept)
        trimtab.unmerge(adapter)
        return difference, False


def unmerged(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Unmerged equals never merged: every bit of the weights."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with _trained(model, method) as adapter:
        trimtab.merge(adapter)
        trimtab.unmerge(adapter)
    return _largest(list(model.state_dict().values()), list(before.values())), True


def loaded(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Saved and loaded equals kept: the logits of an adapter and of its file."""
    with _trained(model, method) as adapter:
        kept = _outputs(model, examples)
        adapter.save(folder / "adapter")
    again = trimtab.load(model, folder / "adapter", name="selftest")
    try:
        return (_outputs(model, examples) - kept).abs().max().item(), True
    finally:
        again.remove()


def routed(model: nn.Module, method: Method, examples: list[Example], folder: Path) -> Outcome:
    """Rows equal one by one: each row of a batch through its own adapter, or the base."""
    ids = torch.tensor([example.input_ids[:7] for example in examples[:3]], device=next(model.parameters()).device)
    with torch.no_grad(), _trained(model, method) as adapter:
        trimtab.switch(model, None)
        base = model(ids[1:2]).logits
        with adapter.enable():
            own = model(ids[:1]).logits
        with trimtab.rows(model, ["selftest", None, "selftest"]):
            together = model(ids).logits
        return _relative(together[:2].double(), torch.cat([own, base]).double()), False


CHECKS = (
    packed,
    shared,
    alone,
    without_logits,
    fast,
    leaner,
    accumulated,
    resumed,
    seeded,
    merged,
    unmerged,
    loaded,
    routed,
)
OF_LOGITS = (merged, routed)
"""The checks that compare logits; the others that allow anything compare gradients."""
