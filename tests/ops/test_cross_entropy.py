"""The loss from hidden states against all logits and plain autograd, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from counting import saved_bytes
from torch import Tensor, nn

from trimtab.ops import cross_entropy, products
from trimtab.ops.cross_entropy import head_cross_entropy, linear_cross_entropy

VOCABULARY, WIDTH, ROWS = 31, 8, 13


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def blocks_of_five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 5 * 4 * VOCABULARY)


def rows(dtype: torch.dtype = torch.float64, count: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(9))
    return drawn(count, WIDTH, dtype=dtype), targets, drawn(count, dtype=dtype, seed=8).abs()


def plain(h: Tensor, t: Tensor, w: Tensor, W: Tensor, b: Tensor | None, scale: float, cap: float | None) -> Tensor:
    z = F.linear(h, W, b) * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    return (F.cross_entropy(z, t, reduction="none") * w).sum()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (1.0, 2.0), (3.0, 1.5)])
def test_loss_and_gradient_are_those_of_all_logits(biased: bool, scale: float, cap: float | None) -> None:
    (h, t, w), W, b = rows(), drawn(VOCABULARY, WIDTH, seed=1), drawn(VOCABULARY, seed=2) if biased else None
    found = []
    for compute in (
        lambda h: linear_cross_entropy(h, t, w, W, b, scale=scale, soft_cap=cap),
        lambda h: plain(h, t, w, W, b, scale, cap),
    ):
        own = h.clone().requires_grad_()
        loss = compute(own)
        found.append((loss.detach(), *torch.autograd.grad(3 * loss, own)))
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)


def test_gradients_agree_with_finite_differences() -> None:
    (h, t, w), W = rows(), drawn(VOCABULARY, WIDTH, seed=1)
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, t, w, W, soft_cap=3.0), h.requires_grad_())


def test_fp32_holds_where_probabilities_underflow() -> None:
    (h, t, w), W = rows(torch.float32), 40 * drawn(VOCABULARY, WIDTH, dtype=torch.float32, seed=1)
    own, exact = h.clone().requires_grad_(), h.double().requires_grad_()
    ours, true = linear_cross_entropy(own, t, w, W), plain(exact, t, w.double(), W.double(), None, 1.0, None)
    assert true > 100
    torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=0)
    (g,), (true_g,) = torch.autograd.grad(ours, own), torch.autograd.grad(true, exact)
    torch.testing.assert_close(g.double(), true_g, rtol=1e-4, atol=1e-4)


def test_without_gradient_the_loss_is_the_same() -> None:
    (h, t, w), W = rows(), drawn(VOCABULARY, WIDTH, seed=1)
    with torch.no_grad():
        bare = linear_cross_entropy(h.requires_grad_(), t, w, W, soft_cap=2.0)
    torch.testing.assert_close(bare, linear_cross_entropy(h, t, w, W, soft_cap=2.0).detach())
    assert not bare.requires_grad


def test_no_rows_are_a_zero_with_a_gradient_of_zero() -> None:
    h = drawn(4, WIDTH).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    loss = linear_cross_entropy(h[none], none, h.new_zeros(0), drawn(VOCABULARY, WIDTH, seed=1))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(h.grad, torch.zeros_like(h))


def test_only_the_hidden_gradient_is_kept() -> None:
    (h, t, w), W = rows(torch.float32), drawn(VOCABULARY, WIDTH, dtype=torch.float32, seed=1)
    h = h.requires_grad_() * 1.0
    assert saved_bytes(lambda: linear_cross_entropy(h, t, w, W)) == h.numel() * 4


@pytest.mark.parametrize("count", [ROWS, 0])
def test_an_adapted_head_gets_its_gradients(count: int) -> None:
    h, t, w = rows(count=count)
    head, change = nn.Linear(WIDTH, VOCABULARY).double(), nn.Linear(WIDTH, VOCABULARY, bias=False).double()
    head.weight.requires_grad_(False)
    trained = [head.bias, change.weight]

    def logits(x: Tensor) -> Tensor:
        return 2.0 * torch.tanh((head(x) + change(x)) / 2.0)

    found = []
    for blocked in (True, False):
        own = h.clone().requires_grad_()
        if blocked:
            loss = head_cross_entropy(own, t, w, logits, VOCABULARY, trained)
        else:
            loss = (F.cross_entropy(logits(own), t, reduction="none") * w).sum()
        found.append((loss.detach(), *torch.autograd.grad(3 * loss, [own, *trained])))
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)


def test_bf16_loss_is_summed_in_fp32(narrow_products: str) -> None:
    (h, t, w), W = rows(torch.bfloat16), drawn(VOCABULARY, WIDTH, dtype=torch.bfloat16, seed=1)
    ours = linear_cross_entropy(h.requires_grad_(), t, w.float(), W)
    true = plain(h.double(), t, w.double(), W.double(), None, 1.0, None)
    assert ours.dtype == torch.float32
    assert abs(ours.item() / true.item() - 1) < 0.01  # logits rounded to 8 bits
    (g,) = torch.autograd.grad(ours, h)
    assert g.dtype == torch.bfloat16


@pytest.mark.parametrize("biased", [True, False])
def test_a_narrow_head_made_wide_in_parts_gives_the_loss_of_the_whole(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "COMPUTED_ON_CPU", set())
    monkeypatch.setattr(products, "WIDE_BYTES", 7 * 4 * WIDTH)
    (h, t, w), W = rows(torch.bfloat16), drawn(VOCABULARY, WIDTH, dtype=torch.bfloat16, seed=1)
    b = drawn(VOCABULARY, dtype=torch.bfloat16, seed=2) if biased else None
    ours = linear_cross_entropy(h.requires_grad_(), t, w.float(), W, b, scale=0.5, soft_cap=2.0)
    (g,) = torch.autograd.grad(ours, h)
    exact = h.detach().double().requires_grad_()
    true = plain(exact, t, w.double(), W.double(), b if b is None else b.double(), 0.5, 2.0)
    torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=0)  # w is rounded to fp32
    torch.testing.assert_close(g.double(), torch.autograd.grad(true, exact)[0], rtol=2**-8, atol=1e-6)
