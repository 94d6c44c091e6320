"""Cross-entropy from hidden states, without ever holding all logits.

    loss = Σᵢ wᵢ (log Σᵥ exp zᵢᵥ − z_{i,tᵢ}),    z = cap(scale · (h Wᵀ + b)),    cap(z) = c tanh(z / c)

The logits of a vocabulary are far larger than everything else in a small model, and autograd keeps several copies of
them. Here they are made for a block of rows at a time, and the gradient to h is computed at once, in the forward pass:
what is kept for backward is one tensor of h's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trimtab.ops.precision import wide
from trimtab.ops.products import product_dtype, times, times_transposed

Head = Callable[[Tensor], Tensor]
BLOCK_BYTES = 2**25  # of fp32 logits: blocks of some 170 rows at 50,000 tokens, where products are already fast


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
) -> Tensor:
    """Σ wᵢ · nats of targets[i], through a frozen linear head. A scalar in fp32 (fp64 where hidden is).

    hidden: [rows, d]. targets: [rows] int64. weights: [rows], of the loss terms. weight: [vocabulary, d], bias:
    [vocabulary]: they get no gradient. scale, soft_cap: what the model does to its logits. No rows: a zero whose
    gradient is zero.
    """
    assert hidden.shape == (len(targets), weight.shape[1]), (hidden.shape, targets.shape, weight.shape)
    dtype = product_dtype(hidden, len(hidden))

    def block(h: Tensor, t: Tensor, w: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
        return _linear_block(h, t, w, weight, bias, dtype, scale, soft_cap, gradient)

    loss: Tensor = _apply(block, weight.shape[0], hidden, targets, weights, ())
    return loss


def head_cross_entropy(
    hidden: Tensor, targets: Tensor, weights: Tensor, head: Head, vocabulary: int, parameters: Sequence[Tensor]
) -> Tensor:
    """The same through any head that maps [rows, d] to logits [rows, vocabulary], and its trained parameters.

    An adapted output head, say. Gradients of the parameters are computed in the forward pass too.
    """

    def block(h: Tensor, t: Tensor, w: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
        return _head_block(h, t, w, head, parameters, gradient)

    loss: Tensor = _apply(block, vocabulary, hidden, targets, weights, parameters)
    return loss


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """[rows] of −log p(target), in fp32 (fp64 where the logits are). logits: [rows, vocabulary]."""
    return F.cross_entropy(logits.to(wide(logits.dtype)), targets, reduction="none")


@torch.no_grad()
def token_nats(hidden: Tensor, targets: Tensor, head: Head, vocabulary: int) -> Tensor:
    """[rows] of −log p(target), without gradient. hidden: [rows, d]; head: [rows, d] to logits [rows, vocabulary]."""
    size = max(1, BLOCK_BYTES // (4 * vocabulary))
    blocks = []
    for h, t in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
        blocks.append(nats(head(h), t))
    return torch.cat(blocks)


Block = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, list[Tensor]]]
"""(hidden, targets, weights of some rows, whether gradients are wanted) to their loss and its gradients: to the
hidden states first, then to each parameter."""


def _apply(
    block: Block, vocabulary: int, hidden: Tensor, targets: Tensor, weights: Tensor, parameters: Sequence[Tensor]
) -> Any:
    size = max(1, BLOCK_BYTES // (4 * vocabulary))
    return _Blocked.apply(block, size, torch.is_grad_enabled(), targets, weights, hidden, *parameters)  # type: ignore[no-untyped-call]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        block: Block,
        size: int,
        gradient: bool,
        targets: Tensor,
        weights: Tensor,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        gradient = gradient and any(t.requires_grad for t in (hidden, *parameters))
        loss = hidden.new_zeros((), dtype=wide(hidden.dtype))
        sums = [torch.zeros_like(p) for p in parameters] if gradient else []
        to_hidden = torch.empty_like(hidden) if gradient else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            part, gradients = block(hidden[rows], targets[rows], weights[rows], gradient)
            loss += part
            if to_hidden is not None:
                to_hidden[rows] = gradients[0]
                for total, more in zip(sums, gradients[1:], strict=True):
                    total += more
        if to_hidden is not None:
            ctx.save_for_backward(to_hidden, *sums)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*[None] * 5, *((kept * grad).to(kept.dtype) for kept in ctx.saved_tensors))


def _linear_block(
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scale: float,
    soft_cap: float | None,
    gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    z = times_transposed(hidden.to(dtype), weight, bias).to(wide(hidden.dtype))  # [rows, vocabulary]
    if scale != 1.0:
        z *= scale
    if soft_cap is not None:
        z = z.div_(soft_cap).tanh_().mul_(soft_cap)
    rows = torch.arange(len(z), device=z.device)
    picked = z[rows, targets]
    if not gradient:
        return ((z.logsumexp(1) - picked) * weights).sum(), []
    p = z.softmax(1)
    top = z.argmax(1)
    # log Σ exp z by way of the largest probability, which cannot underflow: one pass less than logsumexp.
    normaliser = z[rows, top] - p[rows, top].log()
    loss = ((normaliser - picked) * weights).sum()
    p[rows, targets] -= 1.0
    if soft_cap is not None:
        p.addcmul_(p, z.div_(soft_cap).square_(), value=-1.0)  # the derivative of cap is 1 - (z/c)²
    to_hidden = times(p.to(dtype), weight).mul_((weights * scale).to(dtype).unsqueeze(1))
    return loss, [to_hidden.to(hidden.dtype)]


def _head_block(
    hidden: Tensor, targets: Tensor, weights: Tensor, head: Head, parameters: Sequence[Tensor], gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    with torch.set_grad_enabled(gradient):
        own = hidden.detach().requires_grad_(gradient)
        loss = (nats(head(own), targets) * weights).sum()
        gradients = torch.autograd.grad(loss, [own, *parameters]) if gradient else ()
    return loss.detach(), list(gradients)
