"""The LoRA operation against plain autograd: values, gradients, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from counting import saved_bytes
from torch import Tensor

from trimtab.ops.gated import gated
from trimtab.ops.lora_linear import lora_linear


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return drawn(3, 6, dtype=dtype, seed=1).requires_grad_(), drawn(5, 3, dtype=dtype, seed=2).requires_grad_()


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (1, 1, 6), (6,)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_gradients_agree_with_finite_differences(shape: tuple[int, ...], biased: bool, transposed: bool) -> None:
    A, B = factors()
    weight = drawn(6, 5, seed=3).T if transposed else drawn(5, 6, seed=3)
    bias = drawn(5, seed=4) if biased else None
    x = drawn(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, weight, bias, A, B, 0.7), (x, A, B))


def test_a_trained_weight_and_bias_get_their_gradients() -> None:
    A, B = factors()
    weight, bias = drawn(5, 6, seed=3).requires_grad_(), drawn(5, seed=4).requires_grad_()
    x = drawn(2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, 0.7), (x, weight, bias, A, B))


def test_fp32_agrees_with_plain_autograd(library: str) -> None:
    A, B = drawn(16, 96, dtype=torch.float32, seed=1), drawn(64, 16, dtype=torch.float32, seed=2)
    weight, bias = drawn(64, 96, dtype=torch.float32, seed=3).requires_grad_(), drawn(64, dtype=torch.float32, seed=4)
    x, g = drawn(7, 11, 96, dtype=torch.float32), drawn(7, 11, 64, dtype=torch.float32, seed=5)
    results = []
    for fused in (True, False):
        inputs = [*(t.clone().requires_grad_() for t in (x, A, B)), weight]
        if fused:
            y = lora_linear(inputs[0], weight, bias, inputs[1], inputs[2], 2.0)
        else:
            y = F.linear(inputs[0], weight, bias) + 2.0 * F.linear(F.linear(inputs[0], inputs[1]), inputs[2])
        results.append([y.detach(), *torch.autograd.grad(y, inputs, g)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)  # sums of 77 to 96 terms of size 1 to 30


def test_a_bf16_base_keeps_fp32_factors_and_gives_them_fp32_gradients(narrow_products: str) -> None:
    A, B = drawn(16, 96, dtype=torch.float32, seed=1).requires_grad_(), drawn(64, 16, dtype=torch.float32, seed=2)
    weight, x = drawn(64, 96, dtype=torch.bfloat16, seed=3), drawn(32, 96, dtype=torch.bfloat16).requires_grad_()
    B.requires_grad_()
    y = lora_linear(x, weight, None, A, B, 2.0)
    y.backward(drawn(32, 64, dtype=torch.bfloat16, seed=5))
    exact = [t.detach().double().requires_grad_() for t in (x, A, B)]
    z = F.linear(exact[0], weight.double()) + 2.0 * F.linear(F.linear(exact[0], exact[1]), exact[2])
    wanted = torch.autograd.grad(z, exact, drawn(32, 64, dtype=torch.bfloat16, seed=5).double())
    assert (y.dtype, A.grad.dtype, B.grad.dtype, x.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    for ours, true in zip((y, x.grad, A.grad, B.grad), (z.detach(), *wanted), strict=True):
        # bf16 keeps 8 bits: a few roundings of 2^-9 each, in the norm.
        assert (ours.double() - true).norm() < 0.01 * true.norm()


def test_an_input_without_gradient_costs_none() -> None:
    A, B = factors()
    y = lora_linear(drawn(4, 6), drawn(5, 6, seed=3), None, A, B, 1.0)
    y.sum().backward()
    assert A.grad is not None
    assert B.grad is not None


def test_projections_of_one_input_keep_it_once_and_nothing_else(narrow_products: str) -> None:
    x = drawn(64, 96, dtype=torch.bfloat16).requires_grad_()
    shared = x * 1.0
    parts = [
        (
            drawn(out, 96, dtype=torch.bfloat16, seed=out),
            drawn(8, 96, dtype=torch.float32),
            drawn(out, 8, dtype=torch.float32),
        )
        for out in (96, 32, 32)
    ]
    frozen = [t for part in parts for t in part]
    for A, B in ((part[1], part[2]) for part in parts):
        A.requires_grad_(), B.requires_grad_()
    kept = saved_bytes(lambda: sum(lora_linear(shared, W, None, A, B, 1.0).sum() for W, A, B in parts), besides=frozen)
    assert kept == shared.numel() * 2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_A_frozen_the_narrow_product_is_kept_in_the_place_of_the_input(
    dropout: float, narrow_products: str
) -> None:
    x = drawn(64, 96, dtype=torch.bfloat16).requires_grad_() * 1.0
    A, B = drawn(8, 96, dtype=torch.float32), drawn(32, 8, dtype=torch.float32).requires_grad_()
    weight = drawn(32, 96, dtype=torch.bfloat16, seed=3)
    kept = saved_bytes(lambda: lora_linear(x, weight, None, A, B, 1.0, dropout), besides=[A, B, weight])
    assert kept == 64 * 8 * 2
    weight.requires_grad_()
    kept = saved_bytes(lambda: lora_linear(x, weight, None, A, B, 1.0, dropout), besides=[A, B, weight])
    assert kept == x.numel() * 2


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_with_A_frozen_gradients_agree_with_finite_differences(dropout: float) -> None:
    A, B, weight = factors()[0].detach(), factors()[1], drawn(5, 6, seed=3)

    def seeded(x: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(3)
        return lora_linear(x, weight, bias, A, B, 0.7, dropout)

    x, bias = drawn(2, 3, 6).requires_grad_(), drawn(5, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(seeded, (x, B, bias))


def test_with_every_A_frozen_a_gated_input_is_made_again_for_no_one() -> None:
    gate, up = (drawn(64, 96, dtype=torch.float32, seed=i).requires_grad_() for i in (6, 7))
    A, B = drawn(3, 96, dtype=torch.float32), drawn(5, 3, dtype=torch.float32).requires_grad_()
    weight = drawn(5, 96, dtype=torch.float32, seed=3)
    results = []
    for activated in (gated(gate, up, F.silu), F.silu(gate) * up):
        kept = saved_bytes(lambda x=activated: lora_linear(x, weight, None, A, B, 1.0), besides=[A, B, weight])
        assert kept == 64 * 3 * 4
        y = lora_linear(activated, weight, None, A, B, 1.0)
        results.append(torch.autograd.grad(y.square().sum(), [gate, up, B]))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [True, False])
def test_under_autocast_it_is_the_plain_sum(kept: bool) -> None:
    A, B, weight = *factors(torch.float32), drawn(5, 6, dtype=torch.float32, seed=3)
    x = drawn(4, 6, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(kept):
        y = lora_linear(x, weight, None, A, B, 0.7)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x @ (weight + 0.7 * B @ A).T, rtol=0.03, atol=0.05)
    if kept:
        assert torch.autograd.grad(y.sum(), (x, A, B))[1].dtype == torch.float32


@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), (3, 2, 6), (0, 6)])
def test_without_gradients_it_is_the_same(shape: tuple[int, ...]) -> None:
    A, B, weight, bias = *factors(), drawn(5, 6, seed=3), drawn(5, seed=4)
    x = drawn(*shape)
    for other in (x, x.expand(2, *shape).transpose(0, -2)[..., :6]):
        with torch.no_grad():
            y = lora_linear(other, weight, bias, A, B, 0.7)
        torch.testing.assert_close(y, other @ weight.T + bias + 0.7 * other @ A.T @ B.T)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("biased", [True, False])
def test_without_gradients_fp32_factors_serve_a_bf16_base(rows: int, biased: bool, narrow_products: str) -> None:
    A, B, weight = *factors(torch.float32), drawn(5, 6, dtype=torch.bfloat16, seed=3)
    bias = drawn(5, dtype=torch.bfloat16, seed=4) if biased else None
    x = drawn(1, rows, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        y = lora_linear(x, weight, bias, A, B, 0.7)
    exact = x.double() @ (weight.double() + 0.7 * B.double() @ A.double()).T + (0 if bias is None else bias.double())
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("own", "factor"), [(torch.float64, torch.float32), (torch.float32, torch.float16)])
def test_without_gradients_an_input_is_not_cast_to_narrower_factors(own: torch.dtype, factor: torch.dtype) -> None:
    A, B, weight, x = *factors(factor), drawn(5, 6, dtype=own, seed=3), drawn(2, 6, dtype=own) * 1e5
    with torch.no_grad():
        together = lora_linear(x, weight, None, A, B, 0.7)
        alone = torch.cat([lora_linear(row, weight, None, A, B, 0.7) for row in x.split(1)])
    torch.testing.assert_close(alone, together)


def test_dropout_keeps_no_mask() -> None:
    A, B, weight = *factors(torch.float32), drawn(5, 6, dtype=torch.float32, seed=3)
    x = drawn(64, 6, dtype=torch.float32).requires_grad_() * 1.0
    kept = saved_bytes(lambda: lora_linear(x, weight, None, A, B, 1.0, 0.5), besides=[A, B, weight])
    assert kept == x.numel() * 4


def test_dropout_draws_the_same_mask_in_backward() -> None:
    A, B, weight = *factors(), drawn(5, 6, seed=3)
    x = drawn(4, 6).requires_grad_()

    def seeded(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(3)
        return lora_linear(x, weight, None, A, B, 0.7, 0.4)

    assert torch.autograd.gradcheck(seeded, (x, A, B))


def test_dropout_drops_its_share_keeps_the_mean_and_differs_from_call_to_call() -> None:
    eye = torch.eye(200, dtype=torch.float64)
    x, weight = torch.ones(300, 200, dtype=torch.float64), torch.zeros(200, 200, dtype=torch.float64)
    first, second = (lora_linear(x, weight, None, eye, eye, 1.0, 0.25) for _ in range(2))
    assert set(first.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs((first == 0).double().mean() - 0.25) < 0.01  # 60,000 draws: standard deviation 0.0018
    assert not torch.equal(first, second)


def test_what_comes_out_may_be_written_to_in_place() -> None:
    A, B = factors()
    x, weight = drawn(2, 3, 6).requires_grad_(), drawn(5, 6, seed=3)
    found = torch.autograd.grad(lora_linear(x, weight, None, A, B, 0.7).clamp_(-1.0, 1.0).sum(), [x, A, B])
    plain = F.linear(x, weight) + 0.7 * F.linear(F.linear(x, A), B)
    for ours, own in zip(found, torch.autograd.grad(plain.clamp(-1.0, 1.0).sum(), [x, A, B]), strict=True):
        torch.testing.assert_close(ours, own)
