"""The rotation of queries and keys against plain tensor code."""

from __future__ import annotations

import pytest
import torch
from counting import saved_bytes
from torch import Tensor

from trimtab.ops.rotary import rotate


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@pytest.mark.parametrize("transposed", [True, False])
def test_values_and_gradients_are_the_plain_ones(transposed: bool) -> None:
    x = (drawn(1, 3, 2, 8).transpose(1, 2) if transposed else drawn(1, 2, 3, 8)).requires_grad_()
    cos, sin = drawn(1, 1, 3, 8, seed=1), drawn(1, 1, 3, 8, seed=2)
    torch.testing.assert_close(rotate(x, cos, sin), plain(x, cos, sin))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


def test_nothing_of_the_input_is_kept() -> None:
    x, cos, sin = drawn(1, 2, 3, 8).requires_grad_() * 1.0, drawn(1, 1, 3, 8, seed=1), drawn(1, 1, 3, 8, seed=2)
    assert saved_bytes(lambda: rotate(x, cos, sin), besides=[cos, sin]) == 0
