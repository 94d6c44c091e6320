"""Frozen linear maps and low-rank changes of them, as one step of autograd.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ

Plain autograd keeps x Aᵀ and, where dtypes differ, a cast copy of x for every projection; it writes four tensors of
y's size where one is enough. Here x is kept once, by reference, however many projections read it, or what it was made
of where that is kept anyway (see `gated`). The rank-r products are computed again in backward; a frozen W gets no
gradient. Gradients are bracketed through the rank side:

    G = s gᵧ B        gₓ = gᵧ W + G A        g_A = Gᵀ x        g_B = s gᵧᵀ (x Aᵀ)

Where every A is frozen as well, no gradient needs x: the narrow x Aᵀ is kept, and x is not (Zhang et al. 2023,
arXiv 2308.03303).

Projections of one x are computed together within `sharing_inputs`: their A stand below one another, so that one
product serves all of them, and their parts of gₓ are added up in place.

With dropout, A reads x ⊙ m / (1 - p): the mask m is drawn from a seed, and drawn again in backward instead of kept.

Products of a dtype that the machine has no instructions for are computed in fp32 (see `products`): x and W are made
wide for the time of one, and kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trimtab.ops.gated import Recipe, parts_of
from trimtab.ops.precision import autocasts
from trimtab.ops.products import product_dtype, times, times_transposed


class Projection(NamedTuple):
    """W, b, A, B and s of one projection."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float

    def is_that(self, other: Projection) -> bool:
        """Whether both are the same tensors; a weight may be another view of the same memory."""
        W, W2 = self.weight, other.weight
        same_view = W.data_ptr() == W2.data_ptr() and W.shape == W2.shape and W.stride() == W2.stride()
        same_rest = self.bias is other.bias and self.A is other.A and self.B is other.B
        return same_view and same_rest and self.scale == other.scale


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
    own = Projection(weight, bias, A, B, scale)
    shared = None if torch.compiler.is_compiling() else _shared.get()
    if shared is not None and not dropout and A.is_leaf and B.is_leaf:  # factors made for this call do not come again
        return shared.project(x, own)
    return lora_linears(x, [own], dropout)[0]


def _without_gradient(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`lora_linear` in as few calls as may be: a model that writes one token at a time feels each of them."""
    own, rows = x.dtype, x.numel() // A.size(1)
    dtype = product_dtype(x, rows)
    if dtype is own:
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


def lora_linears(x: Tensor, projections: Sequence[Projection], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """`lora_linear` of every projection of x. dropout: one mask for all of them."""
    seed = int(torch.randint(2**62, ()).item()) if dropout else 0  # on the CPU: no device is waited for
    keeps_x = any(t.requires_grad for p in projections for t in (p.weight, p.A))
    recipe, *made = (parts_of(x) if keeps_x else None) or (None,)
    scales = tuple(p.scale for p in projections)
    tensors = [t for p in projections for t in p[:4]]
    y: tuple[Tensor, ...] = _LoRALinears.apply(x, scales, dropout, seed, keeps_x, recipe, *made, *tensors)  # type: ignore[no-untyped-call]
    return y


class SharedInputs:
    """Which projections read the same input: learned in one pass, used in all that follow.

    What was learned is a guess: a projection takes a result made beforehand only when it is called with the very
    tensors that result was made of. Learning stops with the first pass, so that all others round alike.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[Projection]] = {}  # by the first one's A: it, and those that read its input too
        self._learns = True
        self._input: tuple[Tensor, int] | None = None
        self._group: list[Projection] = []
        self._made: list[tuple[Projection, Tensor]] = []

    def project(self, x: Tensor, own: Projection) -> Tensor:
        """The projection of x; those that are known to follow it are made along with it."""
        again = self._input is not None and self._input[0] is x and self._input[1] == x._version
        if self._learns:
            self._group = [*(self._group if again else ()), own]
            self._known[id(self._group[0].A)] = self._group
            self._input = x, x._version
            return lora_linears(x, [own])[0]
        for at, (projection, y) in enumerate(self._made if again else ()):
            if own.is_that(projection):
                del self._made[at]
                return y
        known = self._known.get(id(own.A), [own])
        group = [own, *known[1:]] if own.is_that(known[0]) else [own]
        y, *others = lora_linears(x, group)
        self._input, self._made = (x, x._version), list(zip(group[1:], others, strict=True))
        return y

    def end_pass(self) -> None:
        """Let go of the pass's tensors; the first pass has taught what there is to know."""
        self._learns, self._input, self._group, self._made = False, None, [], []


_shared: ContextVar[SharedInputs | None] = ContextVar("shared", default=None)


@contextmanager
def sharing_inputs(shared: SharedInputs) -> Iterator[None]:
    """Within the block, one forward and backward pass, projections of one input are computed together."""
    token = _shared.set(shared)
    try:
        yield
    finally:
        _shared.reset(token)
        shared.end_pass()


class _LoRALinears(torch.autograd.Function):
    """Tensors: x's parts or none, then W, b, A, B of each projection."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        scales: tuple[float, ...],
        dropout: float,
        seed: int,
        keeps_x: bool,
        recipe: Recipe | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        projections = _by_four(tensors[-4 * len(scales) :])
        dtype = product_dtype(x, x.numel() // x.shape[-1])
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        H = _dropped(rows, dropout, seed) @ _stacked(projections, dtype).T  # [N, Σ r]
        ctx.save_for_backward(*tensors, *([] if recipe else [x if keeps_x else H.to(x.dtype)]))
        ctx.set_materialize_grads(False)
        ctx.rest = scales, dropout, seed, keeps_x, recipe, x.shape  # type: ignore[attr-defined]
        found = []
        for (weight, bias, _, B), h, scale in zip(projections, _columns(H, projections), scales, strict=True):
            y = times_transposed(rows, weight, bias)
            y.addmm_(h, B.to(dtype).T, alpha=scale)
            found.append(y.to(x.dtype).view(*x.shape[:-1], y.shape[-1]))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scales, dropout, seed, keeps_x, recipe, shape = ctx.rest
        tensors = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        kept = recipe.made(*tensors[:2]) if recipe else tensors[-1]  # x, or x Aᵀ of every projection
        end = len(tensors) - (0 if recipe else 1)
        reached = [i for i, grad in enumerate(grads) if grad is not None]
        if not reached:
            return tuple(found)
        every = _by_four(tensors[end - 4 * len(scales) : end])
        projections = [every[i] for i in reached]
        kept, own = kept.reshape(-1, kept.shape[-1]), kept.dtype
        dtype = product_dtype(kept, len(kept))
        kept = kept.to(dtype)
        g = [grad.reshape(-1, grad.shape[-1]).to(dtype) for grad in grads if grad is not None]  # [N, out] each
        G = torch.cat(  # [N, Σ r]
            [(g_i @ B.to(dtype)).mul_(scales[i]) for g_i, i, (*_, B) in zip(g, reached, projections, strict=True)], 1
        )
        a = _stacked(projections, dtype)
        if ctx.needs_input_grad[0]:
            found[0] = _input_gradient(g, G, a, projections, dropout, seed).to(own).view(shape)
        H: Sequence[Tensor]  # [N, r] each
        if keeps_x:
            dropped = _dropped(kept, dropout, seed)
            gA = torch.split(G.T @ dropped, [A.shape[0] for _, _, A, _ in projections])
            H = _columns(dropped @ a.T, projections)
        else:
            H = [_columns(kept, every)[i] for i in reached]
        for at, (i, (_, _, A, B)) in enumerate(zip(reached, projections, strict=True)):
            first = len(found) - 4 * (len(scales) - i)
            needed = ctx.needs_input_grad[first : first + 4]
            found[first : first + 4] = [
                (g[at].T @ kept).to(own) if needed[0] else None,
                g[at].sum(0).to(own) if needed[1] else None,
                gA[at].to(A.dtype) if needed[2] else None,
                (H[at].T @ g[at]).mul_(scales[i]).T.to(B.dtype).contiguous() if needed[3] else None,
            ]
        return tuple(found)


def _input_gradient(
    g: Sequence[Tensor], G: Tensor, a: Tensor, projections: Sequence[tuple[Tensor, ...]], dropout: float, seed: int
) -> Tensor:
    """gₓ [N, in] of the projections together. a: their A below one another."""
    gx = times(g[0], projections[0][0])
    for g_i, (weight, *_) in zip(g[1:], projections[1:], strict=True):
        gx = times(g_i, weight, gx)
    return gx.add_(_dropped(G @ a, dropout, seed)) if dropout else gx.addmm_(G, a)


def _by_four(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return [tuple(tensors[at : at + 4]) for at in range(0, len(tensors), 4)]


def _stacked(projections: Sequence[tuple[Tensor, ...]], dtype: torch.dtype) -> Tensor:
    """Their A below one another, [Σ r, in]."""
    each = [A.to(dtype) for _, _, A, _ in projections]
    return each[0] if len(each) == 1 else torch.cat(each)


def _columns(H: Tensor, projections: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Each projection's columns of H, [N, r]."""
    return torch.split(H, [A.shape[0] for _, _, A, _ in projections], 1)


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x with each entry zeroed with probability p and the rest divided by 1 - p; the same entries for the same seed."""
    if not p:
        return x
    kept = torch.empty_like(x).bernoulli_(1 - p, generator=torch.Generator(x.device).manual_seed(seed))
    return kept.mul_(x).div_(1 - p)
