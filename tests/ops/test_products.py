"""Products of dtypes that a machine may have no instructions for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from counting import saved_bytes
from torch import Tensor

from trimtab.ops import products
from trimtab.ops.products import FEW, linear, product, product_dtype, quicker_than_torch, times, times_transposed

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def test_narrow_products_are_wide_where_the_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "COMPUTED_ON_CPU", {torch.bfloat16})
    found = {d: product_dtype(torch.ones(2, dtype=d)) for d in (torch.bfloat16, torch.float16, torch.float64)}
    assert found == {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float64: torch.float64}
    half = torch.ones(2, dtype=torch.float16)
    assert product_dtype(half, FEW) == torch.float16, "a token at a time, making W wide would cost more"
    assert product_dtype(half, FEW + 1) == torch.float32
    assert product_dtype(torch.ones(2, dtype=torch.float16, device="meta")) == torch.float16


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 40])
@pytest.mark.parametrize("biased", [True, False])
def test_a_frozen_layer_keeps_nothing_and_is_right(narrow_products: str, rows: int, biased: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, W, b, g = (torch.randn(s, generator=draw).bfloat16() for s in ((1, rows, 96), (64, 96), (64,), (1, rows, 64)))
    x, bias = x.requires_grad_() * 1.0, b if biased else None
    assert saved_bytes(lambda: linear(x, W, bias), besides=[W]) == 0
    y = linear(x, W, bias)
    (gx,) = torch.autograd.grad(y, x, g)
    true = F.linear(x.double(), W.double(), bias if bias is None else bias.double()).bfloat16()
    true_gx = (g.double() @ W.double()).bfloat16()
    assert (y.dtype, gx.dtype) == (torch.bfloat16, torch.bfloat16)
    for ours, exact in ((y, true), (gx, true_gx)):
        # One rounding of 2^-9 each, which the two may do on either side of a tie.
        assert (ours.double() - exact.double()).norm() < 2**-9 * exact.double().norm()


@pytest.mark.parametrize("biased", [True, False])
def test_a_trained_layer_is_right_and_keeps_its_input_by_reference(library: str, biased: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, W, b, g = (torch.randn(s, generator=draw) for s in ((3, 7, 96), (64, 96), (64,), (3, 7, 64)))
    inputs = [t.requires_grad_() for t in ([x, W, b] if biased else [x, W])]
    assert saved_bytes(lambda: linear(*inputs), besides=[x, W]) == 0
    y = linear(*inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    true = F.linear(*wide)
    found = [y, *torch.autograd.grad(y, inputs, g)]
    for ours, exact in zip(found, [true, *torch.autograd.grad(true, wide, g.double())], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)  # sums of 21 to 96 terms of size 1


def test_no_rows_give_gradients_of_zero(library: str) -> None:
    x, W, b = (torch.ones(s, requires_grad=True) for s in ((1, 0, 96), (64, 96), (64,)))
    gx, gW, gb = torch.autograd.grad(linear(x, W, b).sum(), [x, W, b])
    assert gx.shape == x.shape
    assert not gW.any()
    assert not gb.any()


def test_biases_of_any_stride(library: str) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(s, generator=draw) for s in ((9, 24), (64, 24), (128,)))
    for own in (bias[::2], bias[:1].expand(64)):
        torch.testing.assert_close(product(a, b, own), a @ b.T + own)


@needs_onednn
def test_a_library_is_chosen_by_dtype_device_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    own = F.linear
    monkeypatch.setattr(products, "BY_ONEDNN", True)
    monkeypatch.setattr(products.F, "linear", lambda *args: called.append(args) or own(*args))
    large, small = torch.ones(64, 128), torch.ones(4, 128)
    assert torch.equal(product(large, torch.ones(129, 128)), torch.full((64, 129), 128.0))
    assert not called
    for a in (small, large.double(), large.to("meta")):
        product(a, torch.ones(129, 128, dtype=a.dtype, device=a.device))
    assert len(called) == 3
    assert quicker_than_torch(large)
    assert not quicker_than_torch(large.double())
    monkeypatch.setattr(products, "BY_ONEDNN", False)
    assert not quicker_than_torch(large)
    product(large, torch.ones(129, 128))
    assert len(called) == 4


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda W: W,
    "transposed, as Conv1D has it": lambda W: W.T.contiguous().T,
    "rows of a larger one": lambda W: torch.cat([W, W])[5 : 5 + len(W)],
    "columns of a larger one": lambda W: torch.cat([W, W], 1)[:, 3 : 3 + W.shape[1]],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [1, 7, 64, 1000])
def test_a_weight_made_wide_in_parts_gives_the_products_of_the_whole(
    kind: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "WIDE_BYTES", 4 * 24 * part)
    draw = torch.Generator().manual_seed(0)
    W = KINDS[kind](torch.randn(64, 24, generator=draw).bfloat16())
    b = torch.randn(64, generator=draw).bfloat16()
    x, g = (torch.randn(s, generator=draw) for s in ((9, 24), (9, 64)))
    wide = W.double()
    for ours, true in (
        (times_transposed(x, W), x.double() @ wide.T),
        (times_transposed(x, W, b), x.double() @ wide.T + b.double()),
        (times(g, W), g.double() @ wide),
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind: str, library: str) -> None:
    draw = torch.Generator().manual_seed(0)
    W, b = KINDS[kind](torch.randn(64, 24, generator=draw)), torch.randn(64, generator=draw)
    x, g = (torch.randn(s, generator=draw) for s in ((9, 24), (9, 64)))
    for ours, true in (
        (product(x, W, b), x.double() @ W.double().T + b.double()),
        (product(g.T, x.T), g.double().T @ x.double()),
        (times(g, W), g.double() @ W.double()),
    ):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


def test_all_weights_are_made_wide_in_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products._scratch, "buffer", None)  # or it could be of an earlier test, outside the mode
    x, weights = torch.ones(9, 24), [torch.full((rows, 24), 2.0).bfloat16() for rows in (64, 64, 32)]
    with torch.inference_mode():
        times_transposed(x, weights[0])
    first = products._scratch.buffer
    found = [times_transposed(x, W) for W in weights]  # outside inference mode the memory can be written again
    assert products._scratch.buffer is first
    assert all(torch.equal(y, torch.full_like(y, 48.0)) for y in found)
