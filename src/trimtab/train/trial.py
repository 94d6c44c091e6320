"""Whether a run computes what plain transformers does: the loss and gradient of a few short examples, both ways.

Every shortcut of a run - fewer steps in a layer, a loss without all logits, examples in one row - is taken for what it
was found to compute when it was looked at alone. Here they are tried together, on the user's model and data.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.adapt.module import modes_kept
from trimtab.data.encode import Example
from trimtab.deltas.layout import original_class
from trimtab.errors import TRIAL_FAILURES, UsageError, ran_out_of_memory
from trimtab.models.fused import fused
from trimtab.models.readout import all_logits
from trimtab.ops.products import NARROW
from trimtab.train.loss import causal_loss
from trimtab.train.packing import PAD, Packing, warn_of_padding

log = logging.getLogger("trimtab")

TOKENS = 24  # of an example of the trial
LOSS, GRADIENT = 1e-4, 1e-3
"""How far apart the two may be in fp32, relative to their size: sums in another order are far less, errors far more."""
NARROW_LOSS, NARROW_GRADIENT = 2e-2, 0.5
"""The same in bf16 and fp16."""


@dataclasses.dataclass(frozen=True)
class Means:
    """By what a loss is computed: how its batches are built, and whether layers and logits take shortcuts."""

    packing: Packing
    lean: bool = True

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model computes by these means."""
        with fused(model) if self.lean else all_logits(model), self.packing.on(model):
            yield


def means_for(
    model: nn.Module,
    trained: Sequence[Tensor],
    wanted: str,
    examples: Sequence[Example],
    packing: Packing,
    pad_id: int = 0,
) -> Means:
    """All shortcuts, with the packing that `wanted` came to, where they agree with plain transformers; else none.

    trained: of what gradients are compared; none for scores. UsageError where a packing was asked for by name that
    does not agree.
    """
    if agrees(model, trained, examples, packing, pad_id):
        return Means(packing)
    if wanted in ("tree", "pack"):
        raise UsageError(f"packing '{wanted}' does not compute what plain transformers does with this model")
    if packing.name != "pad":
        warn_of_padding(model, examples)
    return Means(dataclasses.replace(PAD, reason="nothing else computes what plain transformers does"), lean=False)


def agrees(
    model: nn.Module, trained: Sequence[Tensor], examples: Sequence[Example], packing: Packing, pad_id: int = 0
) -> bool:
    """Whether by all shortcuts a few examples have the loss and gradient of plain transformers; said if not."""
    some = _few(examples)
    if not some:
        return True
    with modes_kept(model), torch.random.fork_rng():
        model.eval()
        wanted = _by_transformers(model, trained, some)
        if not all(bool(tensor.isfinite().all()) for tensor in wanted):
            return True  # of which training tells
        try:
            loss, gradient = map(apart, _by(Means(packing), model, trained, some, pad_id), wanted)
        except TRIAL_FAILURES as error:
            if ran_out_of_memory(error):
                raise
            why = f"they fail ({type(error).__name__}: {error})"
        else:
            narrow = any(parameter.dtype in NARROW for parameter in model.parameters())
            if loss <= (NARROW_LOSS if narrow else LOSS) and gradient <= (NARROW_GRADIENT if narrow else GRADIENT):
                if trained:
                    log.info("checked against plain transformers: loss %.1e, gradient %.1e apart", loss, gradient)
                return True
            why = f"the loss is {loss:.1%} apart from plain transformers'"
            why += f", the gradient {gradient:.1%}" if trained else ""
    name = original_class(model).__name__
    log.warning("%s is computed plainly, without what makes it faster: with that %s", name, why)
    return False


def _few(examples: Sequence[Example]) -> list[Example]:
    """Ends of two short examples, and one that begins as the first and goes on as the second. Each token is a target:
    the more there are, the less their rounding adds up to."""
    short = sorted((e.input_ids for e in examples if len(e.input_ids) > 1), key=len)[:2]
    if not short:
        return []
    first, second = short[0][-TOKENS:], short[-1][-TOKENS:]
    half = min(len(first), len(second)) // 2
    rows = first, second, [*first[:half], *second[half:]]
    return [Example(ids, [True] * len(ids), row, 0, False) for row, ids in enumerate(rows, 1)]


Answer = tuple[Tensor, Tensor]
"""A loss and its gradient, flat, in fp64."""


def _by_transformers(model: nn.Module, trained: Sequence[Tensor], some: Sequence[Example]) -> Answer:
    """Each example by itself, from the model's own logits."""
    losses = []
    for example in some:
        ids = torch.tensor([example.input_ids], device=next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        losses.append(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))
    return _with_gradient(trained, torch.stack(losses).sum())


def _by(means: Means, model: nn.Module, trained: Sequence[Tensor], some: Sequence[Example], pad_id: int) -> Answer:
    with means.on(model):
        batch = means.packing.build(some, pad_id).to(next(model.parameters()).device)
        return _with_gradient(trained, causal_loss(model, batch))


def _with_gradient(trained: Sequence[Tensor], loss: Tensor) -> Answer:
    found = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
    return loss.detach().double(), torch.cat([torch.zeros(0).to(loss), *(g.flatten() for g in whole)]).double()


def apart(ours: Tensor, wanted: Tensor) -> float:
    """|ours − wanted| / |wanted|."""
    return float((ours - wanted).norm() / wanted.norm().clamp(min=1e-12))
