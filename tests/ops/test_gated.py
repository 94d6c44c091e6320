"""The gated activation against plain autograd, and what it and the projection behind it keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from counting import saved_bytes
from torch import Tensor

from trimtab.ops.gated import gated, parts_of
from trimtab.ops.lora_linear import lora_linear


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("activation", [F.silu, torch.nn.SiLU(), F.gelu, F.relu, torch.tanh, torch.nn.Identity()])
def test_gradients_agree_with_finite_differences(activation) -> None:
    g, u = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, activation), (g, u))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_projection_of_it_has_the_gradients_of_plain_autograd(dropout: float) -> None:
    A, B, W = drawn(2, 6, seed=2), drawn(5, 2, seed=3), drawn(5, 6, seed=4)
    found = []
    for plain in (True, False):
        inputs = [t.clone().requires_grad_() for t in (drawn(7, 6), drawn(7, 6, seed=1), A, B)]
        g, u, a, b = inputs
        h = F.silu(g) * u if plain else gated(g, u, F.silu)
        torch.manual_seed(0)
        y = lora_linear(h, W, None, a, b, 0.5, dropout)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)


def test_gate_and_up_are_all_that_is_kept() -> None:
    g, u = drawn(64, 6).requires_grad_() * 1.0, drawn(64, 6, seed=1).requires_grad_() * 1.0
    A, B, W = drawn(2, 6, seed=2).requires_grad_(), drawn(5, 2, seed=3).requires_grad_(), drawn(5, 6, seed=4)
    kept = saved_bytes(lambda: lora_linear(gated(g, u, F.silu), W, None, A, B, 1.0), besides=[A, B, W])
    assert kept == 2 * g.numel() * 8


def test_no_other_tensor_is_taken_for_one() -> None:
    g, u = drawn(2, 3).requires_grad_(), drawn(2, 3, seed=1)
    assert parts_of(gated(g, u, F.silu)) is not None
    assert parts_of(gated(g, u, F.silu) * 1.0) is None
    with torch.no_grad():
        assert parts_of(gated(g, u, F.silu)) is None


def test_one_that_was_written_to_is_made_again_for_no_one() -> None:
    A, B, W = drawn(2, 6, seed=2).requires_grad_(), drawn(5, 2, seed=3).requires_grad_(), drawn(5, 6, seed=4)
    found = []
    for activate in (lambda g, u: F.silu(g) * u, lambda g, u: gated(g, u, F.silu)):
        g, u = drawn(7, 6).requires_grad_(), drawn(7, 6, seed=1).requires_grad_()
        h = activate(g, u)
        h.mul_(2.0)
        assert parts_of(h) is None
        y = lora_linear(h, W, None, A, B, 0.5)
        found.append(torch.autograd.grad(y.square().sum(), (g, u, A, B)))
    for true, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)
