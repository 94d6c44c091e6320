"""How products of matrices are computed: in which dtype, and by which library, where these are not torch's own choice.

A CPU without instructions for bf16 (or fp16) multiplies such matrices many times slower than in fp32. There the
matrices of one product are made wide for the time of it and the result is rounded once: what is kept, for backward or
for good, stays narrow, and sums are the more exact.

A weight is made wide a few rows at a time, always into the same memory: a fresh copy for every product would be a
second head where W is one, and between what is kept the allocator would find no room for the next.

In fp32 torch computes by MKL, which takes no AVX-512 on AMD's processors; oneDNN, which torch has for bf16, does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def _computed_on_cpu() -> set[torch.dtype]:
    """The narrow dtypes that torch has fast products of on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return set()
    ops = torch.ops.mkldnn
    known = {torch.bfloat16: ops._is_mkldnn_bf16_supported, torch.float16: ops._is_mkldnn_fp16_supported}
    return {dtype for dtype, supported in known.items() if supported()}


def _onednn_is_quicker() -> bool:
    """Whether oneDNN computes fp32 products faster than MKL: twice as fast, where it does (benchmarks/RESULTS.md).

    By the processor and not by the clock: every process on a machine is to round alike.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):  # type: ignore[no-untyped-call]
        return False
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_f")) and str(known.get("cpu_name")).startswith("AMD")


NARROW = (torch.bfloat16, torch.float16)
COMPUTED_ON_CPU = _computed_on_cpu()
BY_ONEDNN = _onednn_is_quicker()
FEW = 4
"""Rows up to which what is done around a product takes longer than the slow product does."""
LEAST = 2**20
"""Multiplications up to which calling oneDNN takes longer than it gains."""


def product_dtype(x: Tensor, rows: int | None = None) -> torch.dtype:
    """The dtype in which products with x's rows are computed; its own nearly everywhere. rows: how many they are."""
    dtype = x.dtype
    if dtype not in NARROW or dtype in COMPUTED_ON_CPU or x.device.type != "cpu":
        return dtype
    return torch.float32 if rows is None or rows > FEW else dtype


def _by_onednn(a: Tensor) -> bool:
    return BY_ONEDNN and a.dtype == torch.float32 and a.device.type == "cpu"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a bᵀ + bias, by the quicker library; no gradient. a: [n, k], b: [m, k], any strides; bias: [m]; of one dtype."""
    if not (_by_onednn(a) and a.numel() * len(b) > LEAST):
        return F.linear(a, b, bias)
    bias = None if bias is None else bias.contiguous()  # its stride is not looked at
    y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return y


def quicker_than_torch(weight: Tensor) -> bool:
    """Whether products with a weight are computed another way than torch's own linear layer does."""
    return _by_onednn(weight) or product_dtype(weight) != weight.dtype


WIDE_BYTES = 2**23
"""So much of a weight is wide at once."""


def times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in x's dtype. x: [rows, in]. weight: [out, in], bias: [out], both perhaps narrower; no gradient."""
    if weight.dtype == x.dtype:
        return product(x, weight, bias)
    y = x.new_empty(len(x), len(weight))
    for rows, part in _wide_parts(weight, x.dtype):
        torch.mm(x, part.T, out=y[:, rows])
    return y if bias is None else y.add_(bias)


def times(g: Tensor, weight: Tensor) -> Tensor:
    """g W in g's dtype. g: [rows, out]. weight: [out, in], perhaps narrower; no gradient."""
    if weight.dtype == g.dtype:
        return product(g, weight.T)
    made = g.new_zeros(len(g), weight.shape[1])
    for rows, part in _wide_parts(weight, g.dtype):
        made.addmm_(g[:, rows], part)
    return made


class _Scratch(threading.local):
    """The memory in which a thread makes weights wide."""

    buffer: Tensor | None = None


_scratch = _Scratch()


def _wide_parts(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight in a wider dtype, each part gone when the next one comes."""
    if torch.compiler.is_compiling():
        yield slice(0, len(weight)), weight.to(dtype)
        return
    features = weight.shape[1]
    size = min(len(weight), max(1, WIDE_BYTES // (4 * features)))
    buffer = _scratch.buffer
    if buffer is None or buffer.dtype != dtype or buffer.device != weight.device or len(buffer) < size * features:
        with torch.inference_mode(False):  # it is written again outside that mode
            buffer = _scratch.buffer = torch.empty(size * features, dtype=dtype, device=weight.device)
    for start in range(0, len(weight), size):
        rows = weight[start : start + size]
        flat = buffer[: rows.numel()]
        part = flat.view(features, -1).T if weight.stride(0) == 1 else flat.view(-1, features)
        yield slice(start, start + size), part.copy_(rows)


def unflattened(y: Tensor, x: Tensor) -> Tensor:
    """y [rows, out] in x's shape, [..., out]: no view to autograd, so that a model may write to it in place."""
    out: Tensor = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in `product_dtype`. x: [..., in]; weight [out, in] and bias [out] of its dtype. Differentiable once.

    Nothing is kept for a frozen weight; for one that is trained x is, by reference.
    """
    y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, x if weight.requires_grad else None)  # type: ignore[arg-type]
        rows = x.reshape(-1, x.shape[-1])
        y = times_transposed(rows.to(product_dtype(x, len(rows))), weight, bias)
        return unflattened(y.to(x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        rows = rows.to(product_dtype(grad, len(rows)))
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        gx = times(rows, weight).to(grad.dtype).view(*grad.shape[:-1], weight.shape[1]) if needs_x else None
        gW = gb = None
        if needs_weight:
            gW = product(rows.T, x.reshape(-1, x.shape[-1]).to(rows.dtype).T).to(weight.dtype)
        if needs_bias:
            gb = rows.sum(0).to(grad.dtype)
        return gx, gW, gb
