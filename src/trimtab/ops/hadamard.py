"""The Walsh-Hadamard transform, x H with H unnormalised and in natural order (Sylvester's construction).

    H₁ = [1],    H₂ₙ = [[Hₙ, Hₙ], [Hₙ, −Hₙ]],    H = Hᵀ,    H H = L·I

A butterfly pass (a, b) → (a + b, a − b) for each of the log₂ L bits is bound by memory. H is a Kronecker product of
smaller ones, so five bits are done in one product with H₃₂ instead, on blocks that stay in cache: 64 operations an
element that a processor does at the full rate of its products, in a fifth of the passes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trimtab.ops.precision import wide

BITS = 5
"""log₂ of the largest factor; 16, 64 and 128 are slower on the CPUs measured (benchmarks/hadamard.py)."""

INNER = 2**15
"""Up to this length a whole transform is done on a block while it is in cache."""

BLOCK = 2**18
"""Elements that are worked on at a time: 1 MB in fp32."""


def hadamard(x: Tensor) -> Tensor:
    """x H along the last dimension, of x's shape and dtype. Its gradient is the same transform.

    x: [..., L], L a power of two; below fp32 it is computed in fp32. Takes one copy of x, the result, and a few
    MB. On a GPU with TF32 allowed for products it is as exact as they are.
    """
    y: Tensor = _Hadamard.apply(x)  # type: ignore[no-untyped-call]
    return y


def hadamard_(x: Tensor) -> Tensor:
    """x ← x H, in place and without autograd. x: [..., L], contiguous, in fp32 or fp64, L a power of two."""
    length = x.shape[-1]
    assert length.bit_count() == 1, f"the last dimension is {length}, but must be a power of two"
    assert x.is_contiguous(), "a transform in place needs a contiguous tensor"
    factors = _factors(length)
    inner = 1
    while factors and inner * factors[0] <= INNER:
        inner *= factors.pop(0)
    with torch.autocast(x.device.type, enabled=False):
        _within(x.view(-1, inner))
        for factor in factors:
            _across(x.view(-1, factor, inner))
            inner *= factor
    return x


def _within(x: Tensor) -> None:
    """Transform the rows of x: [n, L] in place, a block of rows at a time."""
    length = x.shape[1]
    for rows in torch.split(x, max(1, BLOCK // length)):
        y, done = rows, 1
        for factor in _factors(length):
            h = _matrix(factor, x.device, x.dtype)
            y = y.reshape(-1, factor) @ h if done == 1 else h @ y.view(-1, factor, done)
            done *= factor
        rows.copy_(y.view_as(rows))


def _across(x: Tensor) -> None:
    """Transform x: [n, r, columns] along r in place, a block of columns at a time."""
    h = _matrix(x.shape[1], x.device, x.dtype)
    for each in x:
        for columns in torch.split(each, max(1, BLOCK // x.shape[1]), dim=1):
            columns.copy_(h @ columns)


def _factors(length: int) -> list[int]:
    """Powers of two, as equal as can be and each at most 2^BITS, whose product is `length`."""
    bits = length.bit_length() - 1
    count = -(-bits // BITS)
    return [2 ** (bits // count + (i < bits % count)) for i in range(count)]


@functools.lru_cache(64)
def _matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """H of a small size. Not to be written."""
    h = torch.ones(1, 1, dtype=dtype)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return h.to(device)


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        copy = x.to(wide(x.dtype), memory_format=torch.contiguous_format, copy=True)
        return hadamard_(copy).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return hadamard(grads[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return hadamard(x.movedim(in_dims[0], 0)), 0
