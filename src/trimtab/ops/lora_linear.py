"""Frozen linear maps and low-rank changes of them, as one step of autograd.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ

Plain autograd keeps x Aᵀ and, where dtypes differ, a cast copy of x for every projection; it writes four tensors of
y's size where one is enough. Here x is kept once, by reference, however many projections read it, or what it was made
of where that is kept anyway (see `gated`). The rank-r products are computed again in backward; a frozen W gets no
gradient. Gradients are bracketed through the rank side:

    G = s gᵧ B        gₓ = gᵧ W + G A        g_A = Gᵀ x        g_B = s gᵧᵀ (x Aᵀ)

Where every A is frozen as well, no gradient needs x: the narrow x Aᵀ is kept, and x is not (Zhang et al. 2023,
arXiv 2308.03303).

With dropout, A reads x ⊙ m / (1 - p): the mask m is drawn from a seed, and drawn again in backward instead of kept.

Products of a dtype that the machine has no instructions for are computed in fp32 (see `products`): x and W are made
wide for the time of one, and kept as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trimtab.ops.gated import Recipe, parts_of
from trimtab.ops.precision import autocasts
from trimtab.ops.products import FEW, product, product_dtype, times, times_transposed, unflattened


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """x Wᵀ + b + scale (dropped(x) Aᵀ) Bᵀ.

    x: [..., in]. weight: [out, in], any strides; bias: [out]; both in x's dtype, and both usually frozen. A: [r, in],
    B: [out, r]: of any floating dtype; the products run in x's `product_dtype`, and gradients come back in the factors'
    own; without gradients a single row goes through wider factors in their dtype.
    dropout: of A's input. Differentiable once. Under autocast it is the plain sum, which that knows how to cast.
    """
    if autocasts(x.device):
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(F.dropout(x, dropout), A), B)
    if not (torch.is_grad_enabled() or dropout):
        return _without_gradient(x, weight, bias, A, B, scale)
    rank, features = A.shape
    assert x.shape[-1] == features == weight.shape[1], (x.shape, A.shape, weight.shape)
    assert B.shape == (weight.shape[0], rank), (B.shape, weight.shape)
    seed = int(torch.randint(2**62, ()).item()) if dropout else 0  # on the CPU: no device is waited for
    keeps_x = weight.requires_grad or A.requires_grad
    recipe, *made = (parts_of(x) if keeps_x else None) or (None,)
    y: Tensor = _LoRALinear.apply(x, scale, dropout, seed, keeps_x, recipe, *made, weight, bias, A, B)  # type: ignore[no-untyped-call]
    return y


def _without_gradient(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`lora_linear` in as few calls as may be: a model that writes one token at a time feels each of them."""
    own, rows = x.dtype, x.numel() // A.size(1)
    dtype = product_dtype(x, rows)
    if dtype is own and rows <= FEW:
        y = F.linear(x, weight, bias)
    else:
        x = x.to(dtype)
        y = times_transposed(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)
    if rows == 1 and A.dtype is B.dtype and A.dtype is not dtype and torch.promote_types(A.dtype, dtype) is A.dtype:
        # One row is sooner cast than the factors.
        y.view(-1).add_(torch.mv(B, torch.mv(A, x.reshape(-1).to(A.dtype))), alpha=scale)
    elif rows == 1:
        y.view(-1).addmv_(B.to(dtype), torch.mv(A.to(dtype), x.reshape(-1)), alpha=scale)
    else:
        h = F.linear(x, A.to(dtype)).view(rows, A.size(0))
        y.view(rows, y.size(-1)).addmm_(h, B.to(dtype).T, alpha=scale)
    return y if dtype is own else y.to(own)


class _LoRALinear(torch.autograd.Function):
    """Tensors: x's parts or none, then W, b, A, B."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        scale: float,
        dropout: float,
        seed: int,
        keeps_x: bool,
        recipe: Recipe | None,
        *tensors: Tensor,
    ) -> Tensor:
        weight, bias, A, B = tensors[-4:]
        dtype = product_dtype(x, x.numel() // x.shape[-1])
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        h = product(_dropped(rows, dropout, seed), A.to(dtype))  # [N, r]
        ctx.save_for_backward(*tensors, *([] if recipe else [x if keeps_x else h.to(x.dtype)]))
        ctx.rest = scale, dropout, seed, keeps_x, recipe, x.shape  # type: ignore[attr-defined]
        y = times_transposed(rows, weight, bias)
        y.addmm_(h, B.to(dtype).T, alpha=scale)
        return unflattened(y.to(x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, dropout, seed, keeps_x, recipe, shape = ctx.rest
        saved = ctx.saved_tensors
        *parts, weight, _, A, B = saved if recipe else saved[:-1]
        kept = recipe.made(*parts) if recipe else saved[-1]  # x, or x Aᵀ
        kept, own = kept.reshape(-1, kept.shape[-1]), kept.dtype
        dtype = product_dtype(kept, len(kept))
        kept, a = kept.to(dtype), A.to(dtype)
        g = grad.reshape(-1, grad.shape[-1]).to(dtype)
        G = product(g, B.to(dtype).T).mul_(scale)  # [N, r]
        gx = gW = gb = gA = gB = None
        if ctx.needs_input_grad[0]:
            gx = times(g, weight)
            gx = gx.add_(_dropped(G @ a, dropout, seed)) if dropout else gx.addmm_(G, a)
            gx = gx.to(own).view(shape)
        needs_W, needs_b, needs_A, needs_B = ctx.needs_input_grad[-4:]
        if needs_W:
            gW = product(g.T, kept.T).to(own)
        if needs_b:
            gb = g.sum(0).to(own)
        read = _dropped(kept, dropout, seed) if keeps_x else None  # what A reads
        if needs_A:
            assert read is not None
            gA = product(G.T, read.T).to(A.dtype)
        if needs_B:
            h = kept if read is None else product(read, a)
            gB = product(h.T, g.T).mul_(scale).T.to(B.dtype).contiguous()
        return gx, *(None,) * (len(ctx.needs_input_grad) - 5), gW, gb, gA, gB


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x with each entry zeroed with probability p and the rest divided by 1 - p; the same entries for the same seed."""
    if not p:
        return x
    kept = torch.empty_like(x).bernoulli_(1 - p, generator=torch.Generator(x.device).manual_seed(seed))
    return kept.mul_(x).div_(1 - p)
