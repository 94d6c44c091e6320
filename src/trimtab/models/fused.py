"""Modules that are computed with less memory, chosen by what they compute.

A module is taken only when it gives, on random inputs, what the fused form gives; it keeps its class, parameters and
hooks and gets a forward of ours for the time of a block.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapt.module import subclass
from trimtab.deltas.layout import original_class
from trimtab.ops.gated import gated

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""The children of a gated feed-forward layer, as transformers' models name them."""


class GatedLayer:
    """Mixed in before a module that computes down(act(gate(x)) ⊙ up(x))."""

    def forward(self, x: Tensor) -> Tensor:
        own = cast("Any", self)
        h: Tensor = own.down_proj(gated(own.gate_proj(x), own.up_proj(x), own.act_fn))
        return h


@contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Within the block the model's gated layers keep less for backward. Gives their number."""
    verdicts: dict[tuple[type, type], bool] = {}
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            if _looks_gated(module):
                kind = type(module), original_class(module.act_fn)  # type: ignore[arg-type]
                if kind not in verdicts:
                    verdicts[kind] = _computes_it(module)
                if verdicts[kind]:
                    module.__class__ = subclass(type(module), GatedLayer)
                    changed.append(module)
        yield len(changed)
    finally:
        for module in changed:
            module.__class__ = cast("Any", type(module)).original_class


def _looks_gated(module: nn.Module) -> bool:
    if not all(hasattr(module, name) for name in GATED) or isinstance(module, GatedLayer):
        return False
    takes = list(inspect.signature(type(module).forward).parameters)
    projections = [isinstance(getattr(module, name), nn.Linear) for name in GATED[:3]]
    return len(takes) == 2 and all(projections) and not any(True for _ in cast("nn.Module", module.act_fn).parameters())


@torch.no_grad()
def _computes_it(module: nn.Module) -> bool:
    weight = cast("Tensor", cast("nn.Module", module.gate_proj).weight)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=draw).to(weight)
    mode = module.training
    module.eval()  # no dropout in the way
    try:
        own, ours = module(x), GatedLayer.forward(cast("Any", module), x)
    finally:
        module.train(mode)
    return bool(torch.equal(own, ours))
