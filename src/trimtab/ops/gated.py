"""The gated activation h = act(g) ⊙ u, keeping g and u alone.

Autograd keeps act(g) and, for the projection behind it, h itself: two more tensors of the widest size in a model. Both
are elementwise functions of g and u, so they are computed again in backward. The result says what it was made of
(`parts_of`), so that `lora_linear` can keep the parts in its place; what that computes again serves both. For SiLU,

    act(g) = g σ(g)        act′(g) = σ(g) (1 + g − act(g))

so that one exponential gives the value and the slope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

Activation = Callable[[Tensor], Tensor]

_PARTS = "_trimtab_parts"


class Recipe:
    """How one gated activation is made again: `activation`, and what the first of its users has computed already."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation
        self._computed: tuple[Tensor, Tensor] | None = None

    def made(self, gate: Tensor, up: Tensor) -> Tensor:
        """h again; the gradient through it is to follow."""
        self._computed = _with_slope(self.activation, gate)
        return self._computed[0] * up

    def value_and_slope(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """act(g) and act′(g), to be written over."""
        found, self._computed = self._computed or _with_slope(self.activation, gate), None
        return found


Parts = tuple[Recipe, Tensor, Tensor]
"""How a gated activation is made again, g and u."""


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) ⊙ up. gate, up: of one shape; activation: elementwise, without parameters."""
    assert gate.shape == up.shape, (gate.shape, up.shape)
    recipe = Recipe(activation)
    h: Tensor = _Gated.apply(gate, up, recipe)  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled():
        setattr(h, _PARTS, (h._version, (recipe, gate, up)))
    return h


def parts_of(h: Tensor) -> Parts | None:
    """What a result of `gated` was made of; None for any other tensor, and for one written to since."""
    version, parts = getattr(h, _PARTS, (0, None))
    return parts if parts is not None and version == h._version else None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.recipe = recipe  # type: ignore[attr-defined]
        active = recipe.activation(gate)
        return active * up if active.data_ptr() == gate.data_ptr() else active.mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        active, slope = ctx.recipe.value_and_slope(gate)
        return slope.mul_(grad).mul_(up), active.mul_(grad), None


def _with_slope(activation: Activation, gate: Tensor) -> tuple[Tensor, Tensor]:
    if activation is F.silu or isinstance(activation, nn.SiLU):
        sigmoid = torch.sigmoid(gate)
        active = sigmoid * gate
        return active, sigmoid.mul_((gate - active).add_(1.0))
    with torch.enable_grad():
        own = gate.detach().requires_grad_()
        active = activation(own)
    (slope,) = torch.autograd.grad(active, own, torch.ones_like(active))
    return active.detach() if active is not own else gate.clone(), slope
