"""Choosing modules, and putting an adapter on them and taking it off again."""

from __future__ import annotations

import cProfile
import logging
import pstats

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trimtab
from toys import Awkward, Holder, Reader, assert_same, built, numbers, reader, seer, snapshot, stir, tokens
from trimtab import LoRA, UsageError
from trimtab.adapt.select import adaptable, base_modules

SMALL = LoRA(rank=2)


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    model = built("llama")
    adapter = trimtab.attach(model, SMALL)
    layers = {p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p != "lm_head"}
    assert set(adapter.deltas) == layers
    assert len(layers) == 14


def test_all_linear_leaves_out_a_fresh_classification_head() -> None:
    assert not any("classifier" in path for path in trimtab.attach(built("bert"), SMALL).deltas)


def test_all_linear_takes_the_head_of_a_plain_model() -> None:
    assert "head" in trimtab.attach(reader(), SMALL).deltas


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ("out", {"blocks.0.out", "blocks.1.out"}),
        (["0.out", "head"], {"blocks.0.out", "head"}),
        ("blocks.0.*", {"blocks.0.qkv", "blocks.0.out"}),
        (r"re:blocks\.\d\.qkv|embed", {"blocks.0.qkv", "blocks.1.qkv", "embed"}),
        (["all-linear", "embed"], {f"blocks.{i}.{n}" for i in "01" for n in ("qkv", "out")} | {"head", "embed"}),
    ],
)
def test_targets_are_ends_of_paths_globs_or_expressions(targets, chosen: set[str]) -> None:
    assert set(trimtab.attach(reader(), SMALL, targets=targets).deltas) == chosen


def test_exclude_takes_modules_out_again() -> None:
    adapter = trimtab.attach(reader(), SMALL, exclude=["blocks.0.*", "head"])
    assert set(adapter.deltas) == {"blocks.1.qkv", "blocks.1.out"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "qvk"}, "target 'qvk' matches no module; did you mean qkv"),
        ({"targets": ["qkv", "headd"]}, "target 'headd' matches no module; did you mean head"),
        ({"targets": "zzz"}, "there are: embed, qkv, out, head"),
        ({"targets": "re:qkv"}, "target 're:qkv' matches no module"),
        ({"targets": "re:(("}, "is not a regular expression"),
        ({"targets": "blocks.0"}, r"names blocks.0 \(Block\), which has no weight to adapt; name its layers: out, qkv"),
        ({"targets": "norm"}, "names norm, which is a LayerNorm, which is not a linear, convolution or embedding"),
        ({"targets": []}, "leave no module to adapt"),
        ({"exclude": ["qvk"]}, "exclude 'qvk' takes out none of the 5 chosen modules; did you mean qkv"),
        ({"targets": "qkv", "exclude": ["qkv"]}, "leave no module to adapt"),
        ({"method": LoRA(rank=9)}, r"blocks.0.qkv \[24, 8\]: rank 9 is above 8, the smaller side"),
        ({"method": LoRA(rank=2, rank_pattern={"head": 4})}, r"head \[3, 8\]: rank 4 is above 3"),
        ({"method": LoRA(rank=2, rank_pattern={"haed": 4})}, "pattern 'haed' matches none of the 5 chosen modules"),
        ({"method": LoRA(rank=2, alpha_pattern={"embed": 4})}, "pattern 'embed' matches none"),
        ({"slices": {"qqq": (True, False)}}, "pattern 'qqq' matches none"),
        ({"slices": {"head": (True, False)}}, "head .* 3 rows cannot be cut into 2 equal parts"),
        ({"slices": {"qkv": (False, False, False)}}, "with at least one chosen"),
        (
            {"targets": "embed", "slices": {"embed": (True, False)}},
            "slices are for linear layers, and this is a embedd",
        ),
        ({"bias": "some"}, "bias is 'some', but must be one of none, all, adapter-only"),
        ({"extra_modules": ["haed"]}, "extra module 'haed' matches no module"),
        ({"targets": "head", "extra_modules": ["head"]}, "every target is among the extra modules"),
        ({"name": "a.b"}, "adapter name 'a.b' cannot be used"),
        ({"name": ""}, "adapter name '' cannot be used"),
        ({"name": "keys"}, "adapter name 'keys' cannot be used"),
        ({"name": "training"}, "adapter name 'training' cannot be used"),
    ],
)
def test_a_wrong_choice_is_refused_by_name_and_changes_nothing(options, message: str) -> None:
    model = reader()
    before = snapshot(model)
    with pytest.raises(UsageError, match=message) as error:
        trimtab.attach(model, **{"method": SMALL, **options})
    assert error.value.exit_code == 2
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\[q\] is 0"),
        ({"rank": 0, "alpha": -1.0}, "2 problems"),
    ],
)
def test_a_wrong_lora_is_refused_with_every_problem_named(options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LoRA(**options)


@pytest.mark.parametrize("name", ["lora", "weight", "deltas", "default", "bias", "A", "sql-2", "0"])
def test_awkward_names_work(name: str, tmp_path) -> None:
    model = reader()
    adapter = stir(trimtab.attach(model, SMALL, name=name, bias="all"))
    wanted = model(tokens(2, 5))
    fresh = reader()
    trimtab.load(fresh, adapter.save(tmp_path / "x"), name=name)
    assert torch.equal(fresh(tokens(2, 5)), wanted)


def test_a_name_in_use_is_refused() -> None:
    model = reader()
    trimtab.attach(model, SMALL, name="a")
    before = snapshot(model)
    with pytest.raises(UsageError, match="already has an adapter 'a'"):
        trimtab.attach(model, SMALL, name="a")
    assert_same(before, snapshot(model))


def test_modules_with_awkward_names_are_adapted_saved_and_loaded(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Awkward(), numbers(2, 4)
    fresh = Awkward()
    fresh.load_state_dict(model.state_dict())
    before = snapshot(model)
    adapter = stir(trimtab.attach(model, SMALL))
    assert set(adapter.deltas) == {"deltas.copies", "deltas.lora_A", "lora", "weight", "default"}
    trimtab.load(fresh, adapter.save(tmp_path / "a"))
    assert torch.equal(fresh(x), model(x))
    adapter.remove()
    assert_same(before, snapshot(model))


def test_a_module_with_an_attribute_of_ours_is_refused_and_nothing_changes() -> None:
    model = reader()
    model.blocks[1].out.deltas = 3
    before = snapshot(model)
    with pytest.raises(UsageError, match=r"blocks.1.out \(Linear\) already has an attribute 'deltas'"):
        trimtab.attach(model, SMALL)
    assert_same(before, snapshot(model))


def test_the_second_adapter_does_not_adapt_the_first() -> None:
    model = reader()
    one = trimtab.attach(model, SMALL, name="one", bias="all", extra_modules=["head"])
    two = trimtab.attach(model, SMALL, name="two", bias="all", extra_modules=["head"], targets="re:.*(qkv|out)")
    assert set(one.deltas) == set(two.deltas)
    assert set(one.copies) == set(two.copies)
    with pytest.raises(UsageError, match="extra module 'one' matches no module"):
        trimtab.attach(model, SMALL, name="three", extra_modules=["one"])


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.attention(x, x, x)[0]))


def test_inside_of_multihead_attention_is_refused_by_name(caplog) -> None:
    with pytest.raises(UsageError, match=r"names attention.out_proj, which is inside a MultiheadAttention"):
        trimtab.attach(Attends(), SMALL, targets="out_proj")
    with pytest.raises(UsageError, match="linear1, which is inside a TransformerEncoderLayer"):
        trimtab.attach(Attends(), SMALL, targets="linear1")
    with pytest.raises(UsageError, match=r"attention.out_proj.weight cannot be trained as a copy"):
        trimtab.attach(Attends(), SMALL, targets="head", extra_modules=["attention"])
    with pytest.raises(UsageError, match="bias cannot be trained as a copy"):
        trimtab.attach(Attends(), SMALL, targets="head", bias="all")
    with caplog.at_level(logging.WARNING):
        adapter = trimtab.attach(Attends(), SMALL)
    assert set(adapter.deltas) == {"head"}
    assert "attention.out_proj is left out of all-linear" in caplog.text


class Doubling(nn.Linear):
    """Stands for a quantised layer: an nn.Linear by class that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_where_every_linear_layer_is_refused_the_first_is_named_with_the_reason() -> None:
    model = nn.Sequential(nn.LayerNorm(4), Doubling(4, 4), Doubling(4, 4))
    with pytest.raises(UsageError, match="'all-linear' matches no module that can be adapted: 1 is a Doubling, which"):
        trimtab.attach(model, SMALL)


def test_a_linear_layer_with_a_forward_of_its_own_is_refused() -> None:
    with pytest.raises(UsageError, match="is a Doubling, which computes otherwise than a linear layer"):
        trimtab.attach(Holder(Doubling(4, 4)), SMALL, targets="layer")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_to_compute_with_are_refused(dtype: torch.dtype) -> None:
    model = Holder(nn.Linear(4, 4))
    model.layer.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    with pytest.raises(UsageError, match=f"layer, which holds {dtype} numbers"):
        trimtab.attach(model, SMALL, targets="layer")


def test_the_log_says_how_much_was_chosen(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="trimtab"):
        trimtab.attach(reader(), SMALL, targets="out")
    assert "lora on 2 modules: 64 parameters" in caplog.text


def test_the_seed_decides_the_start() -> None:
    starts = [trimtab.attach(reader(), SMALL, seed=seed).state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert any(not torch.equal(starts[0][key], starts[2][key]) for key in starts[0])


def test_attaching_leaves_the_global_random_state_alone() -> None:
    model = reader()
    torch.manual_seed(9)
    wanted = torch.rand(1)
    torch.manual_seed(9)
    trimtab.attach(model, SMALL)
    assert torch.equal(torch.rand(1), wanted)


def test_patterns_give_modules_their_own_rank_and_alpha() -> None:
    method = LoRA(rank=4, alpha=8.0, rank_pattern={"blocks.0.*": 2, "qkv": 3}, alpha_pattern={"out": 1.0})
    deltas = trimtab.attach(reader(), method, targets=["qkv", "out"]).deltas
    assert {path: delta.rank_and_alpha() for path, delta in deltas.items()} == {
        "blocks.0.qkv": (2, 8.0),
        "blocks.0.out": (2, 1.0),
        "blocks.1.qkv": (3, 8.0),
        "blocks.1.out": (4, 1.0),
    }


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_scale_is_alpha_over_rank_or_over_its_root(rslora: bool, scale: float) -> None:
    adapter = stir(trimtab.attach(reader(), LoRA(rank=4, alpha=8.0, rslora=rslora), targets="out"))
    delta = adapter.deltas["blocks.0.out"]
    torch.testing.assert_close(delta.weight_change(None), scale * delta.B @ delta.A)


def test_a_starts_kaiming_or_gaussian_and_b_at_zero() -> None:
    model = nn.Sequential(nn.Linear(400, 300))
    kaiming = trimtab.attach(model, LoRA(rank=100), name="k").deltas["0"]
    gaussian = trimtab.attach(model, LoRA(rank=100, init="gaussian"), name="g").deltas["0"]
    assert kaiming.B.abs().max() == gaussian.B.abs().max() == 0
    assert 0.99 / 20 < kaiming.A.abs().max() <= 1 / 20
    # 40,000 draws of standard deviation 1/100: the estimate is within 2% but once in a million times
    assert abs(gaussian.A.std() * 100 - 1) < 0.02


def test_dropout_acts_only_while_training() -> None:
    model, ids = reader(), tokens(2, 5)
    stir(trimtab.attach(model, LoRA(rank=2, dropout=0.5)))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_dropout_acts_on_the_input_of_a_alone() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6)), numbers(50, 6)
    bare = model(x)
    adapter = trimtab.attach(model, LoRA(rank=6, alpha=6, dropout=0.5))
    delta = adapter.deltas["0"]
    delta.A.data, delta.B.data = torch.eye(6), torch.eye(6)  # so that the change is the dropped input itself
    model.train()
    change = model(x) - bare
    dropped = change.abs() < 1e-5
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(change[~dropped], 2 * x[~dropped], rtol=1e-4, atol=1e-5)


def test_an_adapter_in_a_model_in_eval_mode_is_in_eval_mode() -> None:
    model = reader()
    adapter = trimtab.attach(model, LoRA(rank=2, dropout=0.5))
    assert not any(delta.training for delta in adapter.deltas.values())
    model.train()
    assert all(delta.training for delta in adapter.deltas.values())


def test_attaching_costs_few_calls_a_module() -> None:
    """Calls and not seconds, which differ from run to run: attaching to hundreds of modules is to take milliseconds."""
    calls: dict[int, int] = {}
    for count in (10, 60):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))
        profile = cProfile.Profile()
        profile.runcall(trimtab.attach, model, SMALL)
        calls[count] = pstats.Stats(profile).total_calls
    assert (calls[60] - calls[10]) / 50 < 150  # about 110; 244 when each part walked the model by itself


def test_the_dtype_of_the_adapter_is_the_one_asked_for() -> None:
    model = reader().to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        adapter = trimtab.attach(model, SMALL, dtype=dtype)
        assert {p.dtype for p in adapter.parameters()} == {dtype}
        assert model(tokens(2, 5)).dtype == torch.bfloat16
        adapter.remove()


@pytest.mark.parametrize("base", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_have_the_wider_of_the_two_dtypes_and_leave_the_outputs_alone(
    dtype: torch.dtype, base: torch.dtype
) -> None:
    model, ids = reader().to(base), tokens(2, 5)
    wanted = model(ids)
    adapter = trimtab.attach(model, SMALL, dtype=dtype, bias="all", extra_modules=["head", "norm"])
    wider = {torch.float64: torch.float64, torch.bfloat16: dtype}.get(base, torch.float32)
    assert {p.dtype for copies in adapter.copies.values() for p in copies.parameters()} == {wider}
    assert model(ids).dtype == base
    assert torch.equal(model(ids), wanted)


def test_small_steps_add_up_in_the_copies_of_a_bf16_base() -> None:
    model, ids = reader().to(torch.bfloat16), tokens(2, 5)
    adapter = trimtab.attach(model, SMALL, targets="qkv", extra_modules=["head"])
    head, before = adapter.copies["head"], model(ids)
    start = head.weight.detach().clone()
    step = 2.0**-12 * start.abs().max().item()  # a sixteenth of what bf16 tells apart there
    for _ in range(64):
        model(ids).float().sum().backward()
        with torch.no_grad():
            head.weight -= step * head.weight.grad.sign()
        head.weight.grad = None
    torch.testing.assert_close((head.weight - start).abs().max().item(), 64 * step, rtol=1e-3, atol=0.0)
    assert not torch.equal(model(ids), before)
    trimtab.merge(adapter)
    assert torch.equal(model.head.weight, head.weight.to(torch.bfloat16))


def test_a_fused_projection_is_adapted_as_loralib_does() -> None:
    """MergedLinear with enable_lora=[True, False, True]: A stacks the parts, B of each acts on its own rows."""
    model, x = nn.Sequential(nn.Linear(8, 24)), numbers(3, 5, 8)
    bare = model(x)
    adapter = stir(trimtab.attach(model, LoRA(rank=2, alpha=6.0), targets="0", slices={"0": (True, False, True)}))
    q, v = adapter.deltas["0"].parts
    lora_A = torch.cat([q.A, v.A])  # [rank * enabled, in]
    lora_B = torch.cat([q.B, v.B]).unsqueeze(-1)  # [rows of the enabled parts, rank, 1]
    after_A = nn.functional.linear(x, lora_A)
    after_B = nn.functional.conv1d(after_A.transpose(-2, -1), lora_B, groups=2).transpose(-2, -1)
    padded = x.new_zeros(3, 5, 24)
    padded[..., [*range(8), *range(16, 24)]] = after_B * (6.0 / 2)
    torch.testing.assert_close(model(x), bare + padded)


def test_a_sliced_adapter_trains_only_its_slices() -> None:
    model, ids = reader(), tokens(4, 6)
    adapter = stir(trimtab.attach(model, SMALL, targets="qkv", slices={"qkv": (True, False, True)}))
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 2 * (2 * 8 + 8 * 2)
    model(ids).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("gradients", [True, False])
def test_removing_restores_everything(gradients: bool) -> None:
    model = seer()
    model.stem.weight.requires_grad_(gradients)
    before = snapshot(model)
    for options in ({}, {"bias": "all"}, {"extra_modules": ["head"]}, {"extra_modules": ["norm"], "bias": "all"}):
        adapter = stir(trimtab.attach(model, SMALL, targets=["stem", "conv"], **options))
        model.train()
        model(numbers(4, 3, 8, 8)).sum().backward()
        adapter.remove()
        model.eval()
        assert_same(before, snapshot(model))


def test_a_model_removed_from_in_training_mode_is_in_training_mode() -> None:
    model = seer()
    adapter = trimtab.attach(model, SMALL, targets="conv")
    model.train()
    adapter.remove()
    assert all(module.training for module in model.modules())


def test_the_base_is_free_again_only_with_the_last_adapter_gone() -> None:
    model = reader()
    one, two = (trimtab.attach(model, SMALL, name=name) for name in ("one", "two"))
    one.remove()
    assert not model.embed.weight.requires_grad
    assert trimtab.adapters(model) == {"two": two}
    two.remove()
    assert all(p.requires_grad for p in model.parameters())
    assert trimtab.adapters(model) == {}


def test_a_removed_adapter_says_so() -> None:
    model = reader()
    adapter = trimtab.attach(model, SMALL)
    adapter.remove()
    for use in (
        adapter.remove,
        adapter.enable,
        adapter.disable,
        lambda: adapter.save("x"),
        lambda: trimtab.merge(adapter),
    ):
        with pytest.raises(UsageError, match="adapter 'default' was removed"):
            use()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["attach", "remove", "train", "eval", "merge", "unmerge"]), max_size=12), st.randoms())
def test_any_order_of_actions_ends_in_the_same_base(actions: list[str], random) -> None:
    model, count = seer(), 0
    before = snapshot(model)
    for action in actions:
        present = list(trimtab.adapters(model).values())
        chosen = random.choice(present) if present else None
        try:
            if action == "attach":
                count += 1
                options = random.choice([{}, {"bias": "all"}, {"extra_modules": ["norm"]}])
                stir(trimtab.attach(model, SMALL, targets=["stem", "conv"], name=f"n{count}", **options))
            elif action in ("train", "eval"):
                model.train(action == "train")
            elif chosen is not None and action == "remove":
                chosen.remove()
            elif chosen is not None and action == "merge":
                trimtab.merge(chosen, dtype=random.choice([None, torch.bfloat16]))
            elif chosen is not None:
                trimtab.unmerge(chosen)
        except UsageError:
            continue  # what cannot be done now is refused, and changes nothing
        if trimtab.adapters(model) and model.stem.weight.dtype == torch.float32:
            model(numbers(4, 3, 8, 8))  # would move the statistics of the batch norms
    for adapter in list(trimtab.adapters(model).values()):
        if model._trimtab.merged is not None and adapter.name in model._trimtab.merged.names:
            trimtab.unmerge(adapter)
    for adapter in list(trimtab.adapters(model).values()):
        adapter.remove()
    assert_same(before, snapshot(model.eval()))


@pytest.mark.parametrize(
    ("bias", "told"),
    [("all", "but the model has no bias"), ("adapter-only", "but none of the 14 chosen modules has a")],
)
def test_biases_that_are_not_there_are_refused(bias: str, told: str) -> None:
    model = built("llama")
    before = snapshot(model)
    with pytest.raises(UsageError, match=f"bias is '{bias}', {told}"):
        trimtab.attach(model, SMALL, bias=bias)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("lm_haed", r"did you mean lm_head\?"),
        ("self_atn", r"did you mean model\.layers\.0\.self_attn\?"),
        ("nosuch", r"there are: model, lm_head, model\.embed_tokens,"),
    ],
)
def test_an_extra_module_that_is_not_there_is_answered_with_paths(wrong: str, told: str) -> None:
    with pytest.raises(UsageError, match=f"extra module '{wrong}' matches no module; {told}"):
        trimtab.attach(built("llama"), SMALL, extra_modules=[wrong])


def test_a_model_without_tied_targets_is_not_warned_of(caplog) -> None:
    trimtab.attach(built("llama-tied"), SMALL)
    assert not caplog.records


def test_only_a_kind_of_module_that_is_known_is_adaptable() -> None:
    sites, refused = adaptable(base_modules(seer()))
    assert set(sites) == {"stem", "conv", "head.0", "head.4"}
    assert set(refused) == {"norm", "head.1", "head.2"}


def test_attaching_to_a_model_that_is_one_module_works() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), numbers(2, 4)
    before, bare = snapshot(layer), layer(x)
    adapter = stir(trimtab.attach(layer, SMALL))
    torch.testing.assert_close(layer(x), bare + x @ adapter.deltas[""].weight_change(None).T)
    adapter.remove()
    assert_same(before, snapshot(layer))


def test_reader_and_its_copy_agree() -> None:
    assert isinstance(reader(), Reader)
    assert torch.equal(reader()(tokens(2, 4)), reader()(tokens(2, 4)))
