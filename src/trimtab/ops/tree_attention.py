"""Attention over a prefix tree (see `tree`): every token sees the tokens before it in its own sequence.

On a CPU the whole mask is never made. Short sequences go block by block: some rows against the tokens that any of them
sees, as plain products. Scores are computed in fp32, the other products in the dtype that the machine is quick in.
Probabilities are kept for backward where they are few, and computed again where they are many. The heads that share a
key head are rows of the same products.

Long sequences go through flash attention: the tokens of a segment [a, b) with the end e see it causally, and all of
[b, e), which descend from it, see all of it, two calls on slices. A row's partial results over several segments j
combine by their log-sums Lⱼ:

    L = log Σⱼ exp Lⱼ        o = Σⱼ exp(Lⱼ − L) oⱼ

and the gradient of each part is flash attention's own with the final L and o in the place of the part's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trimtab.ops.precision import wide
from trimtab.ops.products import NARROW, product_dtype
from trimtab.ops.tree import Block, Path, Segment, Span, Tree

KEPT = 2
"""Probabilities are kept where they take at most as many times the memory of their queries."""
LONGEST = 768
"""Tokens of a path up to which blocks are as fast as flash attention, or faster (benchmarks/RESULTS.md)."""
LONGEST_NARROW = 2048
"""The same where products are computed in bf16 or fp16: torch's flash attention gains little from their speed."""
SHAPES = 18
"""Blocks of so many shapes are computed in bf16. It compiles five products for each, and keeps `machine.KERNELS` of all
products: of more shapes it would compile every one anew in every layer, so that fp32 is faster."""


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
    plain, on_cpu = soft_cap is None and value.shape[2] == width, query.device.type == "cpu"
    if not on_cpu and (dropout or not plain):
        return _dense(query, key, value, tree, scale, dropout, soft_cap)
    if not on_cpu:
        return _flex(query, key, value, tree, scale)
    out: Tensor
    dtype = product_dtype(query)
    if dtype in NARROW and tree.shapes > SHAPES:
        dtype = wide(dtype)
    if dropout or not plain or tree.longest <= (LONGEST_NARROW if dtype in NARROW else LONGEST):
        seed = int(torch.randint(2**62, ()).item()) if dropout else 0
        out = _Blocked.apply(query, key, value, tree.blocks, scale, dtype, soft_cap, dropout, seed)  # type: ignore[no-untyped-call]
    else:
        out = _Segmented.apply(query, key, value, tree.segments, scale)  # type: ignore[no-untyped-call]
    return out


def _dense(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float, dropout: float, soft_cap: float | None
) -> Tensor:
    """With the whole mask, for what flex attention does not compute."""
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


class _Blocked(torch.autograd.Function):
    """dtype: of the products; scores and probabilities are in fp32 (fp64 where the inputs are). soft_cap: or None.
    dropout: the blocks' masks are drawn one after another from a seed, and again in backward.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[Block, ...],
        scale: float,
        dtype: torch.dtype,
        soft_cap: float | None,
        dropout: float,
        seed: int,
    ) -> Tensor:
        out, o = _token_major(query, key.shape[0], width=value.shape[2])
        scaled, k = _for_scores(query, key, scale)
        v, kept = value.to(dtype), []
        most = KEPT * query.shape[-1] if dtype == query.dtype and soft_cap is None else 0
        drawn = torch.Generator().manual_seed(seed)
        for rows, path, mask in blocks:
            p = _probabilities(_rows(scaled, rows), _along(k, path), mask, soft_cap)[0].to(dtype)
            dropped = p * _drop(p, dropout, drawn) if dropout else p
            o[:, :, slice(*rows)] = (dropped @ _along(v, path)).view(*o.shape[:2], -1, o.shape[3])
            kept.append(p if p.shape[-1] <= most else None)
        ctx.save_for_backward(query, key, value, *kept)  # type: ignore[arg-type]
        ctx.rest = blocks, scale, dtype, soft_cap, dropout, seed  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        blocks, scale, dtype, soft_cap, dropout, seed = ctx.rest
        drawn = torch.Generator().manual_seed(seed)
        to_query, gq = _token_major(query, key.shape[0], dtype)
        again = _for_scores(query, key, scale) if any(p is None for p in kept) else None
        q, k, v, g = (t.to(dtype) for t in (query, key, value, grad))
        q, g = (t.view(*gq.shape[:3], -1) for t in (q, g))
        to_key, to_value = (torch.zeros_like(t, dtype=wide(dtype)) for t in (k, v))
        for (rows, path, mask), p in zip(blocks, kept, strict=True):
            own, go = _rows(q, rows), _rows(g, rows)
            if p is not None:
                wider, slope = p.to(wide(dtype)), None
            else:
                assert again is not None
                wider, slope = _probabilities(_rows(again[0], rows), _along(again[1], path), mask, soft_cap)
                p = wider.to(dtype)
            to_p = (go @ _along(v, path).mT).to(wider.dtype)
            if dropout:
                drop = _drop(p, dropout, drawn)
                to_p, p = to_p.mul_(drop), p * drop
            gs = torch._softmax_backward_data(to_p, wider, -1, wider.dtype)
            gs = (gs if slope is None else gs.mul_(slope)).to(dtype)
            gq[:, :, slice(*rows)] = (gs @ _along(k, path)).view(*gq.shape[:2], -1, gq.shape[3])
            gk, gv, at = gs.mT @ own, p.mT @ go, 0
            for a, b in path:
                to_key[:, a:b] += gk[:, at : at + b - a]
                to_value[:, a:b] += gv[:, at : at + b - a]
                at += b - a
        to_query, to_key = to_query.mul_(scale), to_key.mul_(scale)
        return to_query.to(query.dtype), to_key.to(key.dtype), to_value.to(value.dtype), *(None,) * 6


def _for_scores(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled queries [key_heads, groups, N, width], and keys, both wide: bf16 scores would be rounded by more than
    probabilities can bear."""
    scaled = query.to(wide(query.dtype)) * scale
    return scaled.view(key.shape[0], -1, *query.shape[1:]), key.to(wide(key.dtype))


def _rows(t: Tensor, rows: Span) -> Tensor:
    """Rows of a block, [key_heads, groups · rows, width]. t: [key_heads, groups, N, width]."""
    return t[:, :, slice(*rows)].reshape(t.shape[0], -1, t.shape[3])


def _probabilities(own: Tensor, k: Tensor, mask: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Of a block: the softmax of its scaled queries and the keys of its path; and with a soft cap c of the scores,
    c tanh(score / c), the cap's derivative, 1 - tanh²."""
    scores, slope = own @ k.mT, None
    if soft_cap is not None:
        scores = scores.div_(soft_cap).tanh_()
        slope = 1.0 - scores.square()
        scores.mul_(soft_cap)
    size, masked = mask.shape
    scores.view(own.shape[0], -1, size, k.shape[1])[..., -masked:] += mask
    return scores.softmax(-1), slope


def _drop(p: Tensor, dropout: float, drawn: torch.Generator) -> Tensor:
    """What a block's probabilities are multiplied by: 0 with this probability, else 1 / (1 - dropout)."""
    return torch.empty_like(p).bernoulli_(1.0 - dropout, generator=drawn).div_(1.0 - dropout)


def _along(t: Tensor, path: Path) -> Tensor:
    """The tokens of a path. t: [key_heads, N, width]."""
    return t[:, slice(*path[0])] if len(path) == 1 else torch.cat([t[:, a:b] for a, b in path], 1)


def _token_major(
    query: Tensor, key_heads: int, dtype: torch.dtype | None = None, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """An empty [heads, N, width], laid out as the projection after attention reads it, and by key head."""
    heads, tokens, own = query.shape
    width = own if width is None else width
    out = query.new_empty(tokens, heads, width, dtype=dtype).transpose(0, 1)
    return out, out.view(key_heads, heads // key_heads, tokens, width)


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Segmented(torch.autograd.Function):
    """Flash attention, segment by segment. The heads of one key head are a batch: keys are not copied for them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scale: float
    ) -> Tensor:
        q, k, v = _grouped(*_computed(query, key, value))  # [key_heads, groups, N, width]
        out, o = _token_major(q.view(query.shape), key.shape[0])
        log_sum = q.new_empty(q.shape[:3], dtype=wide(q.dtype))
        for a, b, _ in segments:
            own = slice(a, b)
            o[:, :, own], log_sum[:, :, own] = _forward(
                q[:, :, own], k[:, :, own], v[:, :, own], is_causal=True, scale=scale
            )
        for a, b, end in segments:
            if b < end:
                part = _forward(q[:, :, b:end], k[:, :, a:b], v[:, :, a:b], scale=scale)
                _combine(o[:, :, b:end], log_sum[:, :, b:end], *part)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.rest = segments, scale  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum = ctx.saved_tensors
        narrow, (segments, scale) = query.dtype, ctx.rest
        query, key, value, out, grad = _computed(query, key, value, out, grad)
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
        return gq.view(query.shape).to(narrow), gk.sum(1).to(narrow), gv.sum(1).to(narrow), None, None


def _computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype in which their products are computed."""
    return tuple(t.to(product_dtype(t)) for t in tensors)


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
