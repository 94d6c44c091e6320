"""PiSSA, MiLoRA and OLoRA: which part of the weight they start from, and that the base does not change for it."""

from __future__ import annotations

import logging
from itertools import accumulate, chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import trimtab
from tiny_training import make_llama, whole_and_resumed
from toys import assert_same, built, holder, logits, numbers, snapshot, stir
from trimtab.deltas import core_bases, make_method
from trimtab.deltas.pissa import PartDelta, PiSSA
from trimtab.errors import UsageError
from trimtab.formats.peft import export_peft

NAMES = ["pissa", "milora", "olora"]
each = pytest.mark.parametrize("name", NAMES)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def small(name: str, **options: Any) -> Any:
    return make_method(name, **{"rank": 2, **options})


def start_of(name: str, weight: Tensor, rank: int, scale: float) -> Tensor:
    """The part of W that the paper puts into A and B, dense."""
    if name == "olora":
        Q, R = torch.linalg.qr(weight.double())
        return scale * Q[:, :rank] @ R[:rank]
    U, sigma, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    own = slice(0, rank) if name == "pissa" else slice(-rank, None)
    return U[:, own] @ sigma[own].diag() @ Vh[own]


@each
@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("kind", ["linear", "gpt2-conv1d", "embedding", "conv2d"])
def test_A_and_B_start_as_the_papers_part_of_the_weight(name: str, alpha: float | None, kind: str) -> None:
    model, _ = holder(kind)
    method = small(name) if alpha is None else small(name, alpha=alpha)
    delta = trimtab.attach(model, method, targets="layer").deltas["layer"]
    assert isinstance(delta, PartDelta)
    weight = delta.layout.matrix(model.layer.weight)
    part = delta.scale * delta.B.double() @ delta.A.double()
    torch.testing.assert_close(part, start_of(name, weight, 2, delta.scale), **CLOSE)
    if name != "olora":  # the two share the singular values evenly: √σ each, over √s
        torch.testing.assert_close(delta.A.norm(dim=1), delta.B.norm(dim=0), **CLOSE)


@each
def test_the_map_is_the_rest_of_the_weight_and_the_trained_part(name: str) -> None:
    model, x = holder("linear")
    delta = stir(trimtab.attach(model, small(name, alpha=6.0), targets="layer")).deltas["layer"]
    weight = model.layer.weight.double()
    rest = weight - start_of(name, weight, 2, 3.0)
    dense = rest + 3.0 * delta.B.double() @ delta.A.double()
    torch.testing.assert_close(model(x).double(), F.linear(x.double(), dense, model.layer.bias.double()), **CLOSE)


@each
def test_dropout_is_before_A_and_not_before_the_rest_of_the_weight(name: str) -> None:
    model, x = holder("linear")
    adapter = trimtab.attach(model, small(name, dropout=0.5), targets="layer")
    delta = stir(adapter).deltas["layer"]
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    rest = model.layer.weight - delta.B0 @ delta.A0
    wanted = F.linear(x, rest, model.layer.bias) + F.linear(F.linear(F.dropout(x, 0.5), delta.A), delta.B)
    torch.testing.assert_close(found, wanted, **CLOSE)
    model.eval()
    assert torch.equal(model(x), model(x))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attaching_leaves_the_base_alone_and_removing_restores_it(name: str, dtype: torch.dtype) -> None:
    model = built("llama").to(dtype)
    before, wanted = snapshot(model), logits(model, "llama")
    adapter = trimtab.attach(model, small(name))
    assert torch.equal(logits(model, "llama"), wanted)
    stir(adapter)
    assert not torch.equal(logits(model, "llama"), wanted)
    adapter.remove()
    assert_same(before, snapshot(model))


@each
def test_A_and_B_are_trained_and_their_start_is_kept(name: str) -> None:
    adapter = trimtab.attach(built("llama"), small(name), targets="q_proj")
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters()} == {"A", "B"}
    assert {n.rpartition(".")[2] for n in adapter.state_dict()} == {"A", "B", "A0", "B0"}


def test_the_scale_is_one_unless_alpha_is_given() -> None:
    for name in NAMES:
        assert small(name, rank=5).scale == 1.0
        assert small(name, rank=4, alpha=8.0).scale == 2.0
        assert make_method(**small(name).options()) == small(name)
    with pytest.raises(UsageError, match=r"alpha is 0.0, but must be a finite number above 0"):
        PiSSA(alpha=0.0)


@each
def test_loading_decomposes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama")
    folder = stir(trimtab.attach(model, small(name), targets="q_proj")).save(tmp_path / "a")
    for decomposition in ("svd", "qr"):
        monkeypatch.setattr(torch.linalg, decomposition, None)
    own = built("llama")
    trimtab.load(own, folder)
    assert torch.equal(logits(own, "llama"), logits(model, "llama"))


def test_weights_are_decomposed_together_and_said_so_beforehand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_bases, "cache_root", lambda cache=None: tmp_path)
    with caplog.at_level(logging.INFO):
        trimtab.attach(built("llama"), small("pissa"), targets=["q_proj", "v_proj"])
        trimtab.attach(built("llama"), small("milora"), targets=["q_proj", "v_proj"])
    (said,) = [message for message in caplog.messages if message.startswith("decomposing")]
    assert said.startswith("decomposing 4 weights, about ")


def test_the_time_said_is_not_that_of_a_first_or_a_disturbed_decomposition(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = chain([50.0, 2.0, 9.0], repeat(2.0))
    readings = accumulate(chain.from_iterable((1.0, taken) for taken in seconds))
    monkeypatch.setattr(core_bases, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    weights = [numbers(192, 192, seed=seed) for seed in range(3 * torch.get_num_threads())]
    with caplog.at_level(logging.INFO):
        core_bases.prepare(weights, cache=tmp_path)
    assert f"decomposing {len(weights)} weights, about 6 s" in caplog.text


@each
def test_slices_start_from_their_own_rows(name: str) -> None:
    model, _ = holder("linear")
    adapter = trimtab.attach(model, small(name), targets="layer", slices={"layer": (False, True)})
    (site,) = adapter.weights()
    part = site.delta.B @ site.delta.A  # type: ignore[operator]
    torch.testing.assert_close(part.double(), start_of(name, model.layer.weight[3:], 2, 1.0), **CLOSE)


@pytest.mark.parametrize("name", ["pissa", "milora"])
def test_a_weight_without_enough_directions_is_refused(name: str) -> None:
    model, _ = holder("linear")
    with torch.no_grad():
        model.layer.weight.zero_()
    before = snapshot(model)
    with pytest.raises(UsageError, match=r"layer: the weight has too few directions for rank 2"):
        trimtab.attach(model, small(name), targets="layer")
    assert_same(before, snapshot(model))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    for name in NAMES:
        model, _ = holder("linear")
        with torch.no_grad():
            model.layer.weight[1, 1] = float("nan")
        with pytest.raises(UsageError, match="not finite"):
            trimtab.attach(model, small(name), targets="layer")


@each
def test_small_changes_are_not_lost_in_the_part_they_start_from(name: str) -> None:
    """In bf16, s B A - s B₀ A₀ would round the part away that both share."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48, bias=False).to(torch.bfloat16)
    model = torch.nn.ModuleDict({"layer": layer})
    delta = trimtab.attach(model, small(name, rank=8), targets="layer").deltas["layer"]
    with torch.no_grad():
        delta.A.add_(1e-3 * numbers(*delta.A.shape))
        x = numbers(5, 64, seed=1).to(torch.bfloat16)
        wanted = x.double() @ delta.weight_change(layer.weight).double().T
        found = delta.branch(x, layer.weight).double()
    assert (found - wanted).norm() < 0.02 * wanted.norm()  # a few roundings of 2^-9


@pytest.mark.filterwarnings("ignore")
@each
def test_an_export_is_a_lora_of_twice_the_rank_that_peft_computes_alike(name: str, tmp_path: Path) -> None:
    import peft

    model = built("llama")
    adapter = stir(trimtab.attach(model, small(name)))
    export_peft(adapter, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(built("llama"), tmp_path / "a")
    assert loaded.peft_config["default"].r == 4
    wanted = logits(model, "llama")
    torch.testing.assert_close(logits(loaded, "llama"), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@each
def test_a_resumed_run_ends_the_same(name: str, tmp_path: Path) -> None:
    def attach() -> trimtab.Adapter:
        return trimtab.attach(make_llama(), small(name), seed=5)

    fresh = attach().state_dict()
    whole, resumed = whole_and_resumed(attach, tmp_path, stop=3, batch_size=3, epochs=1, seed=5)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    assert all(torch.equal(whole[key], tensor) == key.endswith("0") for key, tensor in fresh.items())


@each
def test_attaching_tells_how_far_it_is(name: str) -> None:
    seen: list[tuple[float, int]] = []
    model = built("llama")
    with torch.no_grad():  # weights that no other test has decomposed
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.rand_like(parameter))
    adapter = trimtab.attach(model, small(name), progress=lambda done, total, text: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1] == (len(adapter.deltas),) * 2
