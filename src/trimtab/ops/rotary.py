"""Rotary position embedding by halves (Su et al. 2021, arXiv 2104.09864, equation 34, pairs i and i + d/2).

    y₁ = c₁ ⊙ x₁ − s₁ ⊙ x₂        y₂ = c₂ ⊙ x₂ + s₂ ⊙ x₁

Plain tensor code writes x's other half, its negative and three products; here the result is written once and added to.
The gradient is the same with the sines the other way round:

    g₁ = c₁ ⊙ h₁ + s₂ ⊙ h₂        g₂ = c₂ ⊙ h₂ − s₁ ⊙ h₁
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ⊙ cos + (−x₂, x₁) ⊙ sin, of x's shape.

    x: [..., d], d even. cos, sin: broadcastable to it, in its dtype; they get no gradient.
    """
    y: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = _halves(sin)
        return _turned(x, cos, -first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = _halves(sin)
        return _turned(grad, cos, second, -first), None, None


def _turned(x: Tensor, cos: Tensor, of_second: Tensor, of_first: Tensor) -> Tensor:
    """x ⊙ cos, plus its second half times `of_second` in the first place, and the other way round."""
    y = x * cos
    (x1, x2), (y1, y2) = _halves(x), _halves(y)
    y1.addcmul_(x2, of_second)
    y2.addcmul_(x1, of_first)
    return y


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
