"""LoRA-Dash: which directions it takes, when, and that nothing jumps when it does."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import trimtab
from tiny_training import make_examples, make_llama
from toys import Holder, built, holder, logits, numbers, stir
from trimtab.adapt.adapter import Adapter
from trimtab.deltas.core_bases import change_rates, core_bases
from trimtab.deltas.dash import Dash, DashDelta
from trimtab.errors import FormatError, UsageError
from trimtab.formats.peft import export_peft
from trimtab.train.settings import Settings


def small(**options: Any) -> Dash:
    return Dash(**{"rank": 2, "alpha": 6.0, "directions": 3, "warm_up_steps": 2, **options})


def stirred(adapter: Adapter, seed: int = 0) -> Adapter:
    """With factors as after some training, the directions not chosen yet."""
    with torch.no_grad():
        for number, site in enumerate(adapter.weights()):
            delta = dash(site.delta)
            for at, factor in enumerate((delta.A, delta.B)):
                factor.copy_(0.3 * numbers(*factor.shape, seed=seed + 2 * number + at))
    return adapter


def dash(delta: Any) -> DashDelta:
    assert isinstance(delta, DashDelta)
    return delta


def true_rates(weight: Tensor, change: Tensor) -> Tensor:
    """By the definition, from the dense change."""
    U, sigma, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (U.T @ change.double() @ Vh.T).diagonal().abs() / (sigma + 1e-6 * sigma[0])


@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (9, 5)])
def test_change_rates_are_those_of_the_dense_change(shape: tuple[int, int]) -> None:
    W, B, A = numbers(*shape, seed=1), numbers(shape[0], 2, seed=2), numbers(2, shape[1], seed=3)
    torch.testing.assert_close(change_rates(core_bases(W), B, A).double(), true_rates(W, B @ A), rtol=1e-3, atol=1e-5)


def test_a_weight_without_full_rank_has_finite_rates() -> None:
    W = numbers(6, 2, seed=1) @ numbers(2, 6, seed=2)
    assert change_rates(core_bases(W), numbers(6, 2), numbers(2, 6)).isfinite().all()


def test_where_sigma_is_zero_a_change_is_divided_by_a_millionth_of_the_largest() -> None:
    W, B, A = torch.tensor([4.0, 1.0, 0.0]).diag(), torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0, 2.0, 5.0]])
    torch.testing.assert_close(change_rates(core_bases(W), B, A), torch.tensor([0.0, 2 / (1 + 4e-6), 15 / 4e-6]))


def test_the_rates_of_a_weight_of_zeros_are_the_changes_themselves() -> None:
    W, B, A = torch.zeros(4, 4), 10 * numbers(4, 2), numbers(2, 4, seed=1)
    bases = core_bases(W)
    along = (bases.U.T @ B @ A @ bases.V).diagonal()
    assert along.any()
    torch.testing.assert_close(change_rates(bases, B, A), along.abs())


def test_the_directions_that_change_most_are_taken_after_the_warm_up_and_nothing_jumps() -> None:
    model = built("llama")
    adapter = stirred(trimtab.attach(model, small()))
    adapter.after_step(1)
    assert all((dash(site.delta).picked == -1).all() for site in adapter.weights())
    before = logits(model, "llama")
    fresh = adapter.after_step(2)
    assert torch.equal(logits(model, "llama"), before)
    assert {id(p) for p in fresh} == {id(dash(site.delta).d) for site in adapter.weights()}
    for site in adapter.weights():
        rates = true_rates(site.weight, site.delta.weight_change(site.weight))
        assert dash(site.delta).picked.tolist() == rates.topk(3).indices.tolist()


def test_directions_are_chosen_once_and_a_further_run_trains_the_same_ones() -> None:
    model = built("llama")
    adapter = stirred(trimtab.attach(model, small()))
    adapter.after_step(2)
    with torch.no_grad():
        for site in adapter.weights():
            dash(site.delta).d.fill_(0.5)
    stirred(adapter, seed=50)
    before, picked = logits(model, "llama"), [dash(site.delta).picked.clone() for site in adapter.weights()]
    adapter.prepare(2)  # no longer than the warm-up, which is over
    assert adapter.after_step(2) == []
    assert torch.equal(logits(model, "llama"), before)
    assert all(torch.equal(dash(s.delta).picked, p) for s, p in zip(adapter.weights(), picked, strict=True))


@pytest.mark.parametrize("budget", ["layer", "model"])
def test_weights_that_have_not_changed_by_the_switch_are_told(budget: str, caplog: pytest.LogCaptureFixture) -> None:
    adapter = stirred(trimtab.attach(built("llama"), small(budget=budget)))
    still = adapter.weights()[3:5]
    with torch.no_grad():
        dash(still[0].delta).B.zero_()
        dash(still[1].delta).A.zero_()
    adapter.after_step(2)
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"2 of 14 weights have not changed by step 2, the first {still[0].path}:" in told


@pytest.mark.parametrize("options", [{}, {"pick": "random"}], ids=["changed", "drawn"])
def test_where_directions_are_not_chosen_by_zeros_nothing_is_told(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    adapter = trimtab.attach(built("llama"), small(**options))
    if not options:
        stirred(adapter)
    adapter.after_step(2)
    assert [record for record in caplog.records if record.levelno == logging.WARNING] == []


@pytest.mark.parametrize(("pick", "wanted"), [("largest", [0, 1, 2]), ("smallest", [4, 3, 2])])
def test_the_controls_take_the_largest_or_the_smallest_singular_values(pick: str, wanted: list[int]) -> None:
    model, _ = holder("linear")  # [6, 5]
    adapter = stirred(trimtab.attach(model, small(pick=pick), targets="layer"))
    adapter.after_step(2)
    assert dash(adapter.deltas["layer"]).picked.tolist() == wanted


def test_random_directions_are_drawn_from_the_seed_of_the_adapter() -> None:
    picks = []
    for seed in (0, 0, 1):
        model = built("llama")
        adapter = stirred(trimtab.attach(model, small(pick="random"), seed=seed))
        adapter.after_step(2)
        picks.append([tuple(dash(site.delta).picked.tolist()) for site in adapter.weights()])
    assert picks[0] == picks[1] != picks[2]
    assert len(set(picks[0])) > 1


def test_one_budget_goes_where_the_model_changes_most() -> None:
    model = built("llama")
    adapter = stirred(trimtab.attach(model, small(budget="model")))
    adapter.after_step(2)
    sites = adapter.weights()
    counts = [int((dash(site.delta).picked >= 0).sum()) for site in sites]
    assert sum(counts) == 3 * len(sites)
    assert len(set(counts)) > 1
    rates = [true_rates(site.weight, site.delta.weight_change(site.weight)) for site in sites]
    taken = [float(r[i]) for site, r in zip(sites, rates, strict=True) for i in dash(site.delta).picked if i >= 0]
    capped = sorted((float(v) for r in rates for v in r.topk(min(12, len(r))).values), reverse=True)
    assert sorted(taken, reverse=True) == pytest.approx(capped[: len(taken)], rel=1e-3)


def test_one_budget_weighs_each_change_with_its_own_scale() -> None:
    model = built("llama")
    plain, loud = (
        stirred(trimtab.attach(built("llama"), small(budget="model", alpha_pattern=pattern)))
        for pattern in ({}, {"q_proj": 6000.0})
    )
    for adapter in (plain, loud):
        adapter.after_step(2)
    taken = [
        sum(int((dash(s.delta).picked >= 0).sum()) for s in adapter.weights() if s.path.endswith("q_proj"))
        for adapter in (plain, loud)
    ]
    queries = sum(path.endswith("q_proj") for path, _ in model.named_modules())
    assert taken[1] == 12 * queries > taken[0]  # as many as a weight may get


def test_the_map_is_the_definition() -> None:
    model, x = holder("linear")
    adapter = stirred(trimtab.attach(model, small(), targets="layer"))
    adapter.after_step(2)
    delta, weight = dash(adapter.deltas["layer"]), model.layer.weight
    with torch.no_grad():
        delta.d.copy_(torch.tensor([0.5, -1.0, 2.0]))
    U, V = core_bases(weight).U[:, delta.picked], core_bases(weight).V[:, delta.picked]
    dense = weight + 3.0 * delta.B @ delta.A + U @ delta.d.diag() @ V.T
    torch.testing.assert_close(model(x), torch.nn.functional.linear(x, dense, model.layer.bias), rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that is made; views of others are not."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("options", [{}, {"dropout": 0.25}, {"branch": "float32"}], ids=str)
def test_a_token_costs_thin_products_and_no_dense_matrix_is_made(options: dict[str, Any]) -> None:
    model, x = Holder(nn.Linear(48, 64)), numbers(7, 48)
    counted: Any = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}  # not known to it
    with FlopCounterMode(display=False, custom_mapping=counted) as base:
        model(x)
    adapter = stirred(trimtab.attach(model, small(**options), targets="layer"))
    adapter.after_step(2)
    model.train()
    with FlopCounterMode(display=False, custom_mapping=counted) as adapted:
        model(x)
    # A multiplication and an addition for each of r + s directions and every number that comes in or goes out.
    assert adapted.get_total_flops() - base.get_total_flops() == 2 * len(x) * (2 + 3) * (48 + 64)
    with Largest() as largest:
        model(x).sum().backward()
    assert 7 * 64 <= largest.numbers < 48 * 64
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_dropout_drops_nothing_of_what_the_directions_read() -> None:
    model, x = holder("linear")
    adapter = stirred(trimtab.attach(model, small(dropout=0.5), targets="layer"))
    adapter.after_step(2)
    delta = dash(adapter.deltas["layer"])
    with torch.no_grad():
        delta.B.zero_()
        delta.d.fill_(1.0)
    model.train()
    assert torch.equal(model(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_an_export_is_a_lora_of_rank_r_plus_s_that_peft_computes_alike(tmp_path: Path) -> None:
    import peft

    model = built("llama")
    adapter = stir(trimtab.attach(model, small(warm_up_steps=1)))
    wanted = logits(model, "llama")
    export_peft(adapter, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(built("llama"), tmp_path / "a")
    assert loaded.peft_config["default"].r == 5
    torch.testing.assert_close(logits(loaded, "llama"), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def trained(out: Path | None = None, method: Dash | None = None, stop: int | None = None, **settings: Any) -> Adapter:
    """Four steps on a tiny model."""
    adapter = trimtab.attach(make_llama(), method or small(), seed=5)
    options = {"batch_size": 3, "epochs": 1, "lr": 1e-2, "seed": 5, "save_every": 1 if out else None, **settings}

    def on_step(report: Any) -> None:
        if report.step == stop:
            raise KeyboardInterrupt

    trimtab.fit(
        adapter, make_examples(), Settings(**options), out=out, resume=bool(out and out.exists()), on_step=on_step
    )
    return adapter


@pytest.mark.parametrize("method", [small(), small(freeze_factors=True), small(budget="model")])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_stopped_before_at_and_after_the_switch_ends_the_same(method: Dash, stop: int, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", method).state_dict()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", method, stop + 1)
    resumed = trained(tmp_path / "cut", method).state_dict()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert any(tensor.any() for key, tensor in whole.items() if key.endswith(".d"))


def test_optimizer_steps_count_and_not_forward_calls() -> None:
    every = [
        trained(**options).state_dict()
        for options in ({}, {"micro_batch": 1}, {"gradient_checkpointing": True}, {"packing": "pack"})
    ]
    picked = [{k: t.tolist() for k, t in state.items() if k.endswith("picked")} for state in every]
    assert all(indices != [-1] * 3 for indices in picked[0].values())
    assert all(indices == picked[0] for indices in picked[1:])


def test_frozen_factors_stay_once_the_directions_are_chosen() -> None:
    at_switch = trained(method=small(warm_up_steps=2, freeze_factors=True), max_steps=3, lr=1e-2)
    later = trained(method=small(warm_up_steps=2, freeze_factors=True), lr=1e-2)
    for (name, before), (_, after) in zip(at_switch.state_dict().items(), later.state_dict().items(), strict=True):
        if name.endswith((".A", ".B")):
            assert torch.equal(before, after)
    assert all(not p.requires_grad for name, p in later.named_parameters() if name.endswith((".A", ".B")))


def test_the_coordinates_have_a_learning_rate_of_their_own() -> None:
    slow, fast = (trained(method=small(direction_lr=factor), max_steps=3).state_dict() for factor in (0.1, 1.0))
    for key in slow:
        if key.endswith(".d"):
            torch.testing.assert_close(slow[key], 0.1 * fast[key])
        else:
            assert torch.equal(slow[key], fast[key])


def test_a_warm_up_that_the_run_never_leaves_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="warm_up_steps is 100, but the run has 4: no direction would ever be trained"):
        trained(tmp_path / "a", small(warm_up_steps=100))
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


def test_more_directions_than_there_are_is_refused() -> None:
    model, _ = holder("linear")
    with pytest.raises(UsageError, match="9 directions are above the 5 core directions of the weight"):
        trimtab.attach(model, small(directions=9), targets="layer")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"directions": 0}, "directions is 0, but must be a whole number of at least 1"),
        ({"warm_up_steps": 0}, "warm_up_steps is 0"),
        ({"pick": "best"}, "pick is 'best', but must be one of change-rate, random, smallest, largest"),
        ({"budget": "model", "pick": "random"}, "budget 'model' compares change rates"),
        ({"direction_lr": 0.0}, "direction_lr is 0.0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        small(**options)


def test_core_bases_are_computed_once_and_again_where_the_file_is_damaged(tmp_path: Path, caplog) -> None:
    W = numbers(5, 7, seed=1)
    first = core_bases(W, tmp_path)
    (file,) = (tmp_path / "svd").iterdir()
    torch.testing.assert_close(first.U @ first.sigma.diag() @ first.V.T, W, rtol=1e-5, atol=1e-5)
    stamp = file.stat().st_mtime_ns
    assert torch.equal(core_bases(W.clone(), tmp_path).U, first.U)
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(file.read_bytes()[:-5])
    assert torch.equal(core_bases(W, tmp_path).V, first.V)
    assert core_bases(W + 1, tmp_path).sigma[0] != first.sigma[0]
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        core_bases(W, tmp_path / "file")
    assert "are not kept" in caplog.text


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UsageError, match="not finite"):
        core_bases(torch.full((3, 4), float("nan")))


def test_a_saved_adapter_keeps_its_directions(tmp_path: Path) -> None:
    model = built("llama")
    adapter = stir(trimtab.attach(model, small(warm_up_steps=1)))
    other = built("llama")
    loaded = trimtab.load(other, adapter.save(tmp_path / "a"))
    assert torch.equal(logits(other, "llama"), logits(model, "llama"))
    assert loaded.method == adapter.method
    kept = loaded.state_dict()
    assert all(torch.equal(kept[key], tensor) for key, tensor in adapter.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_bf16_base_nothing_jumps_at_the_switch_and_a_saved_adapter_is_the_same(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, after_step, jumped = make_llama().bfloat16(), Adapter.after_step, []

    def watched(adapter: Adapter, step: int) -> list[nn.Parameter]:
        before = logits(model, "llama")
        fresh = after_step(adapter, step)
        jumped.append((bool(fresh), not torch.equal(logits(model, "llama"), before)))
        return fresh

    monkeypatch.setattr(Adapter, "after_step", watched)
    adapter = trimtab.attach(model, small(), seed=5, dtype=dtype)
    trimtab.fit(adapter, make_examples(), Settings(batch_size=3, epochs=1, lr=1e-2, seed=5, packing="pad"))
    assert jumped == [(False, False), (True, False), (False, False), (False, False)]
    state = adapter.state_dict()
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {dtype}
    assert all(bool(t.all()) for key, t in state.items() if key.endswith(".d"))
    other = make_llama().bfloat16()
    loaded = trimtab.load(other, adapter.save(tmp_path / "a")).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    assert torch.equal(logits(other, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_directions_of_another_base_are_refused_and_those_of_a_rounded_one_are_not(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = stir(trimtab.attach(built("llama"), small(warm_up_steps=1))).save(tmp_path / "a")
    trimtab.load(built("llama").to(dtype), folder)
    other = built("llama").to(dtype)
    layer = other.model.layers[1].mlp.up_proj
    with torch.no_grad():  # the values that tell bases apart are kept; the directions turn
        kept = layer.weight.clone()
        layer.weight.copy_(layer.weight.flip(1))
    own = json.loads((folder / "trimtab.json").read_text())
    del own["base"]["model.layers.1.mlp.up_proj"]
    (folder / "trimtab.json").write_text(json.dumps(own))
    assert not torch.equal(kept, layer.weight)
    with pytest.raises(FormatError, match=r"directions kept for model.layers.1.mlp.up_proj.*any-base"):
        trimtab.load(other, folder)
    trimtab.load(other, folder, any_base=True)
