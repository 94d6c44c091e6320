"""Root-mean-square normalisation with a frozen weight (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4).

    y = (w₀ + w) ⊙ x ρ,    ρ = 1 / √(mean(x²) + ε)

Plain autograd walks over x some fifteen times and, below fp32, keeps a wide copy of it. Here x is kept by reference,
and ρ, one number a row:

    gₓ = ρ h − x ρ³ mean(h ⊙ x),    h = (w₀ + w) ⊙ gᵧ
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trimtab.ops.precision import wide


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """(offset + weight) ⊙ x / √(mean(x²) + epsilon), of x's shape and dtype.

    x: [..., d], normalised in fp32 (fp64 where it is). weight: [d], gets no gradient. offset: w₀, 1 in Gemma.
    """
    assert x.shape[-1:] == weight.shape, (x.shape, weight.shape)
    y: Tensor = _RMSNorm.apply(x, weight, epsilon, offset)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
        rho = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, rho)
        ctx.offset = offset  # type: ignore[attr-defined]
        y: Tensor = x * rho
        if offset:  # as Gemma does: rounded once, at the end
            return y.mul_(weight.to(rho.dtype) + offset).to(x.dtype)
        return y.to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rho = ctx.saved_tensors
        wider = x.to(rho.dtype)
        h = grad * (weight.to(rho.dtype) + ctx.offset if ctx.offset else weight)
        h = h.to(rho.dtype)
        along = torch.linalg.vecdot(h, wider).unsqueeze(-1)
        gx = h.mul_(rho).addcmul_(wider, along.mul_(rho.pow(3)), value=-1.0 / x.shape[-1])
        return gx.to(x.dtype), None, None, None
