"""A dense export computes what the adapter computed, whatever its method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trimtab
from toys import MODULES, built, fits, holder, logits, small, stir
from trimtab.deltas import METHODS, method_class
from trimtab.errors import UsageError
from trimtab.formats.dense import export_dense

MERGEABLE = [method for method in METHODS if method_class(method).mergeable]
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}  # two orders of summation in fp32, over fewer than 100 terms


@pytest.mark.parametrize("method", MERGEABLE)
def test_it_computes_the_same_on_every_kind_of_module(method: str, tmp_path: Path) -> None:
    for kind in (kind for kind in MODULES if fits(method, kind)):
        model, x = holder(kind)
        adapter = stir(trimtab.attach(model, small(method), targets="layer"))
        fresh, _ = holder(kind)
        loaded = trimtab.load(fresh, export_dense(adapter, tmp_path / kind))
        assert loaded.method == trimtab.Full()
        assert loaded.provenance["dense_of"]["name"] == method
        torch.testing.assert_close(fresh(x), model(x), **ROUNDING)


@pytest.mark.parametrize("method", ["lora", "subspace"])
def test_slices_biases_and_extra_modules_come_along(method: str, tmp_path: Path) -> None:
    model, other = built("bert"), built("bert")
    adapter = trimtab.attach(
        model, small(method), targets=["query", "value"], bias="all", extra_modules=["classifier"],
        slices={"query": (True, False)},
    )  # fmt: skip
    stir(adapter)
    trimtab.load(other, export_dense(adapter, tmp_path / "dense"))
    torch.testing.assert_close(logits(other, "bert"), logits(model, "bert"), rtol=1e-4, atol=1e-5)


def test_what_has_no_dense_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="computes what no weights can"):
        export_dense(trimtab.attach(built("llama"), small("houlsby")), tmp_path / "a")
    adapter = stir(trimtab.attach(built("llama"), small("lora")))
    trimtab.merge(adapter)
    with pytest.raises(UsageError, match="unmerge it first"):
        export_dense(adapter, tmp_path / "b")
