"""A frozen linear map and a low-rank change of it, as one step of autograd.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ

Plain autograd keeps x Aᵀ and, where dtypes differ, a cast copy of x for every projection; it writes four tensors of
y's size where one is enough. Here x is kept once, by reference, however many projections read it, or what it was made
of where that is kept anyway (see `gated`). The rank-r products are computed again in backward; a frozen W gets no
gradient. Gradients are bracketed through the rank side:

    G = s gᵧ B        gₓ = gᵧ W + G A        g_A = Gᵀ x        g_B = s gᵧᵀ (x Aᵀ)

With dropout, A reads x ⊙ m / (1 - p): the mask m is drawn from a seed, and drawn again in backward instead of kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trimtab.ops.gated import Activation, made_of, parts_of


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """x Wᵀ + b + scale (dropped(x) Aᵀ) Bᵀ.

    x: [..., in]. weight: [out, in], any strides; bias: [out]; both in x's dtype, and both usually frozen. A: [r, in],
    B: [out, r]: of any floating dtype; the products run in x's, and gradients come back in the factors' own.
    dropout: of A's input. Differentiable once.
    """
    rank, features = A.shape
    assert x.shape[-1] == features == weight.shape[1], (x.shape, A.shape, weight.shape)
    assert B.shape == (weight.shape[0], rank), (B.shape, weight.shape)
    seed = int(torch.randint(2**62, ()).item()) if dropout else 0  # on the CPU: no device is waited for
    activation, *made = parts_of(x) or (None,)
    y: Tensor = _LoRALinear.apply(x, weight, bias, A, B, scale, dropout, seed, activation, *made)  # type: ignore[no-untyped-call]
    return y


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: float,
        seed: int,
        activation: Activation | None,
        *made: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, A, B, *(made or (x,)))
        ctx.rest = scale, dropout, seed, activation  # type: ignore[attr-defined]
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias)
        y.addmm_(_dropped(rows, dropout, seed) @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, *kept = ctx.saved_tensors
        scale, dropout, seed, activation = ctx.rest
        x = made_of((activation, *kept)) if activation else kept[0]
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # [N, in], [N, out]
        a, b = A.to(x.dtype), B.to(x.dtype)
        G = (g @ b).mul_(scale)  # [N, r]
        gx = gW = gb = gA = gB = None
        if ctx.needs_input_grad[0]:
            gx = g @ weight
            if dropout:
                gx += _dropped(G @ a, dropout, seed)
            else:
                gx.addmm_(G, a)
            gx = gx.view(x.shape)
        if ctx.needs_input_grad[1]:
            gW = g.T @ rows
        if ctx.needs_input_grad[2]:
            gb = g.sum(0)
        dropped = _dropped(rows, dropout, seed)
        if ctx.needs_input_grad[3]:
            gA = (G.T @ dropped).to(A.dtype)
        if ctx.needs_input_grad[4]:
            gB = (g.T @ (dropped @ a.T).mul_(scale)).to(B.dtype)
        return gx, gW, gb, gA, gB, *[None] * (len(ctx.needs_input_grad) - 5)


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x with each entry zeroed with probability p and the rest divided by 1 - p; the same entries for the same seed."""
    if not p:
        return x
    kept = torch.empty_like(x).bernoulli_(1 - p, generator=torch.Generator(x.device).manual_seed(seed))
    return kept.mul_(x).div_(1 - p)
