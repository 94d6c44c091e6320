"""The ways in which products may be computed, whatever this machine's own is."""

from __future__ import annotations

import pytest
import torch

from trimtab.ops import products


@pytest.fixture(params=["computed in bf16", "computed in fp32"])
def narrow_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    known = {torch.bfloat16, torch.float16} if request.param == "computed in bf16" else set()
    monkeypatch.setattr(products, "COMPUTED_ON_CPU", known)
    return request.param


@pytest.fixture(params=["torch's own", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By which fp32 products are computed, however small."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "BY_ONEDNN", request.param == "oneDNN")
    monkeypatch.setattr(products, "LEAST", 0)
    return request.param
