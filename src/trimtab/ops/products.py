"""In which dtype products of matrices are computed, where that is not the dtype they are kept in.

A CPU without instructions for bf16 (or fp16) multiplies such matrices many times slower than in fp32. There the
matrices of one product are made wide for the time of it and the result is rounded once: what is kept, for backward or
for good, stays narrow, and sums are the more exact.
"""

from __future__ import annotations

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


NARROW = (torch.bfloat16, torch.float16)
COMPUTED_ON_CPU = _computed_on_cpu()
FEW = 4
"""Rows up to which making a matrix wide takes longer than the slow product does."""


def product_dtype(x: Tensor, rows: int | None = None) -> torch.dtype:
    """The dtype in which products with x's rows are computed; its own nearly everywhere. rows: how many they are."""
    dtype = x.dtype
    if dtype not in NARROW or dtype in COMPUTED_ON_CPU or x.device.type != "cpu":
        return dtype
    return torch.float32 if rows is None or rows > FEW else dtype


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in `product_dtype`. x: [..., in]. weight [out, in] and bias [out] get no gradient; nothing is kept."""
    y: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        dtype = product_dtype(x, x.numel() // x.shape[-1])
        y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dtype = product_dtype(grad, grad.numel() // grad.shape[-1])
        return (grad.to(dtype) @ weight.to(dtype)).to(grad.dtype), None, None
