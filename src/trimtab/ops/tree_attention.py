"""Attention over a prefix tree: sequences that begin alike share what they begin with.

Tokens stand in depth-first order; end[j] is one past the last descendant of token j. Token i sees the tokens before it
in its own sequence, which is to say

    i attends to j   iff   j ≤ i < end[j]

On a CPU no mask is made. A run of tokens without a branch in it is a segment [a, b) whose tokens share one end e. Its
tokens see their own segment causally, and all of [b, e), which descend from it, see all of [a, b): two plain calls on
slices. A row's partial results over several segments j combine exactly by their log-sums Lⱼ:

    L = log Σⱼ exp Lⱼ        o = Σⱼ exp(Lⱼ − L) oⱼ

and the gradient of each part is flash attention's own with the final L and o in the place of the part's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trimtab.ops.precision import wide

Segment = tuple[int, int, int]
"""(a, b, e): the tokens [a, b) without a branch among them, and the end e that they share."""


class Tree:
    """The shape of a packed row. end: [N] int64 on the device of the tokens; segments: the same, for slicing."""

    def __init__(self, end: Tensor, segments: Sequence[Segment]) -> None:
        self.end = end
        self.segments = tuple(segments)
        self._block_mask: Any = None

    @staticmethod
    def of(end: Sequence[int]) -> Tree:
        """The tree of the ends of its tokens. Token j goes on j - 1's segment iff both have the same end."""
        starts = [j for j, stop in enumerate(end) if j == 0 or stop != end[j - 1]]
        segments = [(a, b, end[a]) for a, b in zip(starts, [*starts[1:], len(end)], strict=True)]
        return Tree(torch.tensor(end), segments)

    def to(self, device: torch.device | str) -> Tree:
        """The same tree with `end` on `device`."""
        return Tree(self.end.to(device), self.segments)

    def mask(self) -> Tensor:
        """[N, N] bool: whether token i (row) attends to token j (column)."""
        at = torch.arange(len(self.end), device=self.end.device)
        return (at <= at.unsqueeze(1)) & (at.unsqueeze(1) < self.end)

    def block_mask(self) -> Any:
        """flex attention's form of the mask, made once."""
        if self._block_mask is None:
            from torch.nn.attention.flex_attention import create_block_mask

            end, size = self.end, len(self.end)

            def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return (j <= i) & (i < end[j])

            self._block_mask = create_block_mask(sees, None, None, size, size, device=str(end.device))
        return self._block_mask


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    soft_cap: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ, over the tokens each one sees) v. Returns [heads, N, head_dim].

    query: [heads, N, head_dim]. key, value: [key_heads, N, head_dim], key_heads a divisor of heads. scale: by default
    1/√head_dim. dropout: of the attention probabilities. soft_cap: c of c tanh(score / c).
    """
    heads, tokens, width = query.shape
    assert key.shape[:2] == value.shape[:2] == (key.shape[0], tokens), (query.shape, key.shape, value.shape)
    assert heads % key.shape[0] == 0, (heads, key.shape)
    scale = width**-0.5 if scale is None else scale
    if dropout or soft_cap is not None or value.shape[2] != width:
        return _dense(query, key, value, tree, scale, dropout, soft_cap)
    if query.device.type != "cpu":
        return _flex(query, key, value, tree, scale)
    out: Tensor = _Segmented.apply(query, key, value, tree.segments, scale)  # type: ignore[no-untyped-call]
    return out


def _dense(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float, dropout: float, soft_cap: float | None
) -> Tensor:
    """With the whole mask, for what no fast kernel here computes."""
    groups = query.shape[0] // key.shape[0]
    key, value = (t.repeat_interleave(groups, 0) for t in (key, value))
    if soft_cap is None:
        return F.scaled_dot_product_attention(query, key, value, tree.mask(), dropout, scale=scale)
    scores = soft_cap * torch.tanh(query @ key.transpose(1, 2) * scale / soft_cap)
    p = scores.masked_fill(~tree.mask(), -torch.inf).softmax(-1, dtype=wide(scores.dtype)).to(query.dtype)
    return F.dropout(p, dropout) @ value


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    attend = _compiled_flex() if query.is_cuda else flex_attention
    groups = query.shape[0] != key.shape[0]
    args = (t.unsqueeze(0) for t in (query, key, value))
    out: Tensor = attend(*args, block_mask=tree.block_mask(), scale=scale, enable_gqa=groups)
    return out.squeeze(0)


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Segmented(torch.autograd.Function):
    """Flash attention, segment by segment. The heads of one key head are a batch: keys are not copied for them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scale: float
    ) -> Tensor:
        q, k, v = _grouped(query, key, value)  # [key_heads, groups, N, width]
        # [N, heads, width] in memory, as the projection after attention reads it.
        out = query.new_empty(query.shape[1], query.shape[0], query.shape[2]).transpose(0, 1)
        o, log_sum = out.view(q.shape), q.new_empty(q.shape[:3], dtype=wide(q.dtype))
        for a, b, _ in segments:
            own = slice(a, b)
            o[:, :, own], log_sum[:, :, own] = _forward(
                q[:, :, own], k[:, :, own], v[:, :, own], is_causal=True, scale=scale
            )
        for a, b, end in segments:
            if b < end:
                part = _forward(q[:, :, b:end], k[:, :, a:b], v[:, :, a:b], scale=scale)
                _combine(o[:, :, b:end], log_sum[:, :, b:end], *part)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.rest = segments, scale  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum = ctx.saved_tensors
        segments, scale = ctx.rest
        q, k, v = _grouped(query, key, value)
        o, g = out.view(q.shape), grad.view(q.shape)
        gq, gk, gv = (torch.zeros(q.shape, dtype=wide(q.dtype), device=q.device) for _ in range(3))
        for a, b, end in segments:
            for rows, causal in ((slice(a, b), True), (slice(b, end), False)):
                if rows.start < rows.stop:
                    part = _backward(
                        g[:, :, rows],
                        q[:, :, rows],
                        k[:, :, a:b],
                        v[:, :, a:b],
                        o[:, :, rows],
                        log_sum[:, :, rows],
                        0.0,
                        causal,
                        scale=scale,
                    )
                    gq[:, :, rows] += part[0]
                    gk[:, :, a:b] += part[1]
                    gv[:, :, a:b] += part[2]
        to_query = gq.view(query.shape).to(query.dtype)
        return to_query, gk.sum(1).to(key.dtype), gv.sum(1).to(value.dtype), None, None


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[heads, N, width] as [key_heads, groups, N, width]; keys and values are views of stride 0."""
    key_heads, groups = key.shape[0], query.shape[0] // key.shape[0]
    q = query.view(key_heads, groups, *query.shape[1:])
    k, v = (t.unsqueeze(1).expand(-1, groups, -1, -1) for t in (key, value))
    return q, k, v


def _combine(out: Tensor, log_sum: Tensor, more: Tensor, more_log_sum: Tensor) -> None:
    """Take a further part into `out` and `log_sum`, in place."""
    total = torch.logaddexp(log_sum, more_log_sum)
    out.mul_((log_sum - total).exp_().unsqueeze(-1)).add_(more * (more_log_sum - total).exp_().unsqueeze(-1))
    log_sum.copy_(total)
