"""Whether a run computes what plain transformers does: the loss and gradient of a few short examples, both ways.

Every shortcut of a run - fewer steps in a layer, a loss without all logits, examples in one row - is taken for what it
was found to compute when it was looked at alone. Here they are tried together, on the user's model and data.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.module import modes_kept
from trimtab.data.encode import Example
from trimtab.deltas.layout import original_class
from trimtab.errors import TRIAL_FAILURES, UsageError, ran_out_of_memory
from trimtab.models.fused import fused
from trimtab.models.readout import forget_readout
from trimtab.ops.products import NARROW
from trimtab.train.loss import causal_loss
from trimtab.train.packing import PAD, Packing

log = logging.getLogger("trimtab")

TOKENS = 24  # of an example of the trial
LOSS, GRADIENT = 1e-4, 1e-3
"""How far apart the two may be in fp32, relative to their size: sums in another order are far less, errors far more."""
NARROW_LOSS, NARROW_GRADIENT = 2e-2, 0.3
"""The same in bf16 and fp16."""


def is_plain(adapter: Adapter, examples: Sequence[Example], packing: Packing, pad_id: int = 0) -> bool:
    """Whether training by these means has the loss and gradient of plain transformers; said in the log if not."""
    model = adapter.model
    narrow = any(parameter.dtype in NARROW for parameter in model.parameters())
    try:
        loss, gradient = departure(adapter, examples, packing, pad_id)
    except TRIAL_FAILURES as error:
        if ran_out_of_memory(error):
            raise
        why = f"they fail ({type(error).__name__}: {error})"
    else:
        if not (loss > (NARROW_LOSS if narrow else LOSS) or gradient > (NARROW_GRADIENT if narrow else GRADIENT)):
            log.info("checked against plain transformers: loss %.1e, gradient %.1e apart", loss, gradient)
            return True
        why = f"the loss is {loss:.1%} apart from plain transformers', the gradient {gradient:.1%}"
    name = original_class(model).__name__
    log.warning("%s is trained plainly, without what makes it faster: with that %s", name, why)
    return False


def plainly(model: nn.Module, wanted: str) -> Packing:
    """Padded batches and all logits, for a model that `is_plain` says no of. UsageError where others were asked for."""
    if wanted in ("tree", "pack"):
        raise UsageError(f"packing '{wanted}' does not compute what plain transformers does with this model")
    forget_readout(model)
    return dataclasses.replace(PAD, reason="nothing else computes what plain transformers does")


def departure(adapter: Adapter, examples: Sequence[Example], packing: Packing, pad_id: int = 0) -> tuple[float, float]:
    """How far the loss and the gradient of a run are from plain transformers', relative to their size; 0 for numbers
    that are not finite, which training tells of.
    """
    model, some = adapter.model, _few(examples)
    device = next(model.parameters()).device
    with modes_kept(model), torch.random.fork_rng():
        model.eval()
        plain, gradient = _with_gradient(adapter, torch.stack([_plainly(model, example) for example in some]).sum())
        with fused(model), packing.on(model):
            ours, own = _with_gradient(adapter, causal_loss(model, packing.build(some, pad_id).to(device)))
    if not (math.isfinite(plain) and bool(gradient.isfinite().all())):
        return 0.0, 0.0
    return abs(ours - plain) / max(abs(plain), 1e-6), float((own - gradient).norm() / gradient.norm().clamp(min=1e-12))


def _few(examples: Sequence[Example]) -> list[Example]:
    """Ends of two short examples, and one that begins as the first and goes on as the second. Each token is a target:
    the more there are, the less their rounding adds up to."""
    short = sorted((e.input_ids for e in examples if e.targets), key=len)[:2]
    first, second = short[0][-TOKENS:], short[-1][-TOKENS:]
    half = min(len(first), len(second)) // 2
    rows = first, second, [*first[:half], *second[half:]]
    return [Example(ids, [True] * len(ids), row, 0, False) for row, ids in enumerate(rows, 1)]


def _plainly(model: nn.Module, example: Example) -> Tensor:
    """The loss of one example by itself, from the model's own logits."""
    ids = torch.tensor([example.input_ids], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    return F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")


def _with_gradient(adapter: Adapter, loss: Tensor) -> tuple[float, Tensor]:
    parameters = adapter.parameters()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return float(loss.detach()), torch.cat([g.flatten().double() for g in whole])
