"""Products of dtypes that a machine may have no instructions for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from counting import saved_bytes

from trimtab.ops import products
from trimtab.ops.products import FEW, frozen_linear, product_dtype


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
    assert saved_bytes(lambda: frozen_linear(x, W, bias), besides=[W]) == 0
    y = frozen_linear(x, W, bias)
    (gx,) = torch.autograd.grad(y, x, g)
    true = F.linear(x.double(), W.double(), bias if bias is None else bias.double()).bfloat16()
    true_gx = (g.double() @ W.double()).bfloat16()
    assert (y.dtype, gx.dtype) == (torch.bfloat16, torch.bfloat16)
    for ours, exact in ((y, true), (gx, true_gx)):
        # One rounding of 2^-9 each, which the two may do on either side of a tie.
        assert (ours.double() - exact.double()).norm() < 2**-9 * exact.double().norm()
