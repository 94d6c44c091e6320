"""The gated activation h = act(g) ⊙ u, keeping g and u alone.

Autograd keeps act(g) and, for the projection behind it, h itself: two more tensors of the widest size in a model. Both
are elementwise functions of g and u, so they are computed again in backward. The result says what it was made of
(`parts_of`), so that `lora_linear` can keep the parts in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Activation = Callable[[Tensor], Tensor]
Parts = tuple[Activation, Tensor, Tensor]
"""(act, g, u) of a gated activation."""

_PARTS = "_trimtab_parts"


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) ⊙ up. gate, up: of one shape; activation: elementwise, without parameters."""
    assert gate.shape == up.shape, (gate.shape, up.shape)
    h: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled():
        setattr(h, _PARTS, (activation, gate, up))
    return h


def parts_of(h: Tensor) -> Parts | None:
    """What a result of `gated` was made of; None for any other tensor."""
    found: Parts | None = getattr(h, _PARTS, None)
    return found


def made_of(parts: Parts) -> Tensor:
    """h again."""
    activation, gate, up = parts
    return activation(gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation  # type: ignore[attr-defined]
        return made_of((activation, gate, up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            own = gate.detach().requires_grad_()
            active = ctx.activation(own)
        (to_gate,) = torch.autograd.grad(active, own, grad * up)
        return to_gate, active.detach().mul_(grad), None
