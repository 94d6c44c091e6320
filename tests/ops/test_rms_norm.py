"""The norm with a frozen weight against plain autograd, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from counting import saved_bytes
from torch import Tensor

from trimtab.ops.rms_norm import rms_norm


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    return (offset + weight) * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 1, 3, 6)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_values_and_gradients_are_the_plain_ones(shape: tuple[int, ...], offset: float) -> None:
    x, weight = drawn(*shape).requires_grad_(), drawn(6, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-2, offset), plain(x, weight, 1e-2, offset))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-2, offset), (x,))


def test_a_row_of_zeros_has_a_gradient() -> None:
    x = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, drawn(6, seed=1), 1e-2), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_is_kept_by_reference_and_one_number_a_row(dtype: torch.dtype) -> None:
    x, weight = drawn(64, 96, dtype=dtype).requires_grad_() * 1.0, drawn(96, dtype=dtype, seed=1)
    kept = saved_bytes(lambda: rms_norm(x, weight, 1e-5), besides=[weight])
    assert kept == x.numel() * x.element_size() + 64 * 4


def test_bf16_differs_by_its_rounding_alone() -> None:
    exact, weight, g = drawn(32, 96), drawn(96, seed=1), drawn(32, 96, seed=2)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        x = exact.to(torch.bfloat16).to(dtype).requires_grad_()
        w, h = weight.to(torch.bfloat16).to(dtype), g.to(torch.bfloat16).to(dtype)
        y = rms_norm(x, w, 1e-5) if dtype == torch.bfloat16 else plain(x, w, 1e-5, 0.0)
        found.append((y.detach(), *torch.autograd.grad(y, x, h)))
    for ours, true in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - true).norm() < 0.01 * true.norm()  # 8 bits
