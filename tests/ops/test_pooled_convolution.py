from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trimtab.ops.pooled_convolution import pooled_convolution


def reference(images, weight, bias):
    return functional.max_pool2d(functional.conv2d(images, weight, bias), 2)


@pytest.mark.parametrize(("channels", "out", "k", "side"), [(1, 6, 5, 28), (3, 2, 3, 11), (2, 4, 4, 9), (1, 1, 1, 4)])
def test_it_is_a_convolution_pooled(channels, out, k, side):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, channels, side, side + 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(out, channels, k, k, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(out, generator=generator, dtype=torch.float64, requires_grad=True)
    got, expected = pooled_convolution(images, weight, bias), reference(images, weight, bias)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, (weight, bias), upstream), torch.autograd.grad(expected, (weight, bias), upstream)
    )


def test_ties_of_an_empty_background_count_once():
    images = torch.zeros(2, 1, 12, 12, dtype=torch.float64)
    images[:, :, 4:7, 4:7] = 1.0  # edges and corners, where patches repeat, beside nothing
    weight = torch.randn(
        2, 1, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(
            make(images, weight, bias).square().sum() + make(images, weight, bias).sum(), (weight, bias)
        )
        for make in (pooled_convolution, reference)
    )
    torch.testing.assert_close(ours, theirs)
