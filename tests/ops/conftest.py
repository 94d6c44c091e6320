"""Both ways in which narrow products may be computed, whatever this machine's own is."""

from __future__ import annotations

import pytest
import torch

from trimtab.ops import products


@pytest.fixture(params=["computed in bf16", "computed in fp32"])
def narrow_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    known = {torch.bfloat16, torch.float16} if request.param == "computed in bf16" else set()
    monkeypatch.setattr(products, "COMPUTED_ON_CPU", known)
    return request.param
