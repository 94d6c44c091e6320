"""Switching, routing and training adapters: their copies, their gradients, what stays frozen."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import trimtab
from toys import batch, built, logits, numbers, reader, seer, snapshot, stir, tokens
from trimtab import Full, LoRA, UsageError

SMALL = LoRA(rank=2)
IDS = tokens(4, 6)
SAME = {"rtol": 1e-5, "atol": 1e-6}  # fp32, batched otherwise


def two(model: Any, **options: Any) -> list[Any]:
    """Two adapters that differ, a and b, on a model."""
    return [
        stir(trimtab.attach(model, SMALL, name=name, **options), seed=100 * number) for number, name in enumerate("ab")
    ]


def test_switch_uses_exactly_one_adapter_or_none() -> None:
    model = reader()
    bare = model(IDS)
    a, b = two(model)
    assert (a.enabled, b.enabled) == (False, True)
    outputs = {}
    for name in ("a", "b", None):
        trimtab.switch(model, name)
        outputs[name] = model(IDS)
        assert (a.enabled, b.enabled) == (name == "a", name == "b")
    assert torch.equal(outputs[None], bare)
    assert not torch.allclose(outputs["a"], outputs["b"])
    assert not torch.allclose(outputs["a"], bare)


def test_switching_to_an_unknown_name_is_refused_and_switches_nothing() -> None:
    model = reader()
    two(model)
    with pytest.raises(UsageError, match=r"no adapter 'aa' on this model; did you mean a\? \(there are: a, b\)"):
        trimtab.switch(model, "aa")
    assert trimtab.adapters(model)["b"].enabled
    with pytest.raises(UsageError, match="this Reader has no adapter"):
        trimtab.switch(reader(), "a")


def test_disable_is_the_base_until_its_end_also_nested() -> None:
    model = reader()
    bare = model(IDS)
    adapter = stir(trimtab.attach(model, SMALL))
    changed = model(IDS)
    with adapter.disable():
        assert torch.equal(model(IDS), bare)
        with adapter.enable():
            assert torch.equal(model(IDS), changed)
            with adapter.disable(), adapter.disable():
                assert torch.equal(model(IDS), bare)
            assert torch.equal(model(IDS), changed)
        assert torch.equal(model(IDS), bare)
    assert torch.equal(model(IDS), changed)
    adapter.disable()
    assert torch.equal(model(IDS), bare)
    adapter.enable()
    assert torch.equal(model(IDS), changed)


def test_disable_ends_also_when_the_block_raises() -> None:
    model = reader()
    adapter = trimtab.attach(model, SMALL)
    with pytest.raises(RuntimeError), adapter.disable():
        raise RuntimeError
    assert adapter.enabled


def test_an_adapter_removed_within_a_block_stays_removed() -> None:
    model = reader()
    a, b = two(model)
    with a.enable():
        b.remove()
    assert trimtab.adapters(model) == {"a": a}
    assert not a.enabled


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_rows_of_a_batch_go_through_their_own_adapters(name: str) -> None:
    model = built(name)
    two(model)
    inputs = {k: v for k, v in batch(name, rows=4).items() if k != "labels" or name == "t5"}
    with trimtab.rows(model, ["a", None, "b", "a"]), torch.no_grad():
        routed = model(**inputs).logits
    for row, own in enumerate(("a", None, "b", "a")):
        trimtab.switch(model, own)
        with torch.no_grad():
            alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
        # a product of fewer rows adds up in another order
        torch.testing.assert_close(routed[row : row + 1], alone, rtol=1e-5, atol=5e-6)


def test_rows_generate_as_each_adapter_does_alone() -> None:
    model = built("llama")
    two(model)
    prompt = tokens(3, 4, vocabulary=48)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with trimtab.rows(model, ["b", "a", None]):
        together = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    for row, name in enumerate(("b", "a", None)):
        trimtab.switch(model, name)
        own = prompt[row : row + 1]
        assert torch.equal(model.generate(own, attention_mask=torch.ones_like(own), **options)[0], together[row])


def test_rows_route_trained_copies_too() -> None:
    model = reader()
    two(model, extra_modules=["head", "norm"], bias="all")
    with trimtab.rows(model, ["a", "b", None, "b"]):
        routed = model(IDS)
    for row, name in enumerate(("a", "b", None, "b")):
        trimtab.switch(model, name)
        torch.testing.assert_close(routed[row], model(IDS)[row], **SAME)


def test_rows_route_modules_called_with_keywords() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

        def forward(self, *, x, shift, pair=True):
            return (x * self.factor + shift, {"x": x}) if pair else x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 3), Scale()

        def forward(self, x):
            return self.scale(x=self.linear(input=x), shift=x)

    torch.manual_seed(0)
    model, x = Model(), numbers(4, 3)
    two(model, extra_modules=["scale"])
    names = ["b", "a", None, "a"]
    with trimtab.rows(model, names):
        routed, extra = model(x)
    for row, name in enumerate(names):
        trimtab.switch(model, name)
        torch.testing.assert_close(routed[row], model(x)[0][row], **SAME)
        torch.testing.assert_close(extra["x"][row], model(x)[1]["x"][row], **SAME)


def test_rows_take_their_numbers_to_the_device_of_the_modules_once() -> None:
    moved = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            moved.extend([func] * (func is torch.ops.aten._to_copy.default))
            return func(*args, **(kwargs or {}))

    model, moved_ids = reader(), IDS.to("meta")  # a device other than the CPU, on any machine
    two(model)
    model.to("meta")
    with trimtab.rows(model, ["a", None, "b", "a"]), Counting():
        assert model(moved_ids).shape == (4, 3)
    assert moved == []


def test_rows_give_each_adapter_the_gradients_of_its_own_rows() -> None:
    model = reader().double()
    a, b = two(model)
    with trimtab.rows(model, ["a", "b", "b", None]):
        model(IDS).square().sum().backward()
    routed = [p.grad for p in [*a.parameters(), *b.parameters()]]
    for adapter, own in ((a, IDS[:1]), (b, IDS[1:3])):
        trimtab.switch(model, adapter.name)
        alone = torch.autograd.grad(model(own).square().sum(), adapter.parameters())
        for parameter, gradient in zip(adapter.parameters(), alone, strict=True):
            # the factors are fp32, so their gradients are rounded to it
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)
    assert all(gradient is not None for gradient in routed)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "was given 1 names, but a Linear received a batch of 4"),
        (["a"] * 5, "was given 5 names, but a Linear received a batch of 4"),
        ([], "needs one name for each row"),
        (["a", "b", "x", None], "no adapter 'x' on this model"),
    ],
)
def test_rows_with_wrong_names_are_refused_and_routing_ends(names: list[str], message: str) -> None:
    model = reader()
    two(model)
    wanted = model(IDS)
    with pytest.raises(UsageError, match=message), trimtab.rows(model, names):
        model(IDS)
    assert torch.equal(model(IDS), wanted)


def test_removing_within_rows_leaves_nothing_behind() -> None:
    model = reader()
    before = snapshot(model)
    a, b = two(model)
    with trimtab.rows(model, ["a"] * 4):
        a.remove()
        b.remove()
    assert snapshot(model)["attributes"] == before["attributes"]


@pytest.mark.parametrize("bias", ["none", "adapter-only", "all"])
def test_bias_modes_train_the_biases_they_say(bias: str) -> None:
    model = reader()
    adapter = trimtab.attach(model, SMALL, targets="out", bias=bias)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias") and "copies" not in name}
    wanted = {"none": set(), "adapter-only": {"blocks.0.out.bias", "blocks.1.out.bias"}, "all": biases}[bias]
    assert {f"{p}.{n}" for p, copies in adapter.copies.items() for n, _ in copies.named_parameters()} == wanted
    base = snapshot(model)
    stir(adapter)
    ids = {id(p) for p in adapter.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in ids:
            assert torch.equal(parameter, base["tensors"][name])


def test_a_trained_bias_acts_only_while_its_adapter_is_enabled() -> None:
    model = reader()
    bare = model(IDS)
    adapter = trimtab.attach(model, SMALL, targets="qkv", bias="all")
    assert torch.equal(model(IDS), bare)
    with torch.no_grad():
        adapter.copies["head"].bias += 1
    torch.testing.assert_close(model(IDS), bare + 1)
    with adapter.disable():
        assert torch.equal(model(IDS), bare)


def test_extra_modules_are_trained_whole_beside_the_frozen_ones() -> None:
    model = seer()
    adapter = trimtab.attach(model, SMALL, targets="conv", extra_modules=["head"])
    assert adapter.whole == ("head",)
    kept = snapshot(model)
    model.train()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    wanted = {path: module.state_dict() for path, module in adapter.copies.items()}
    before = copy.deepcopy(wanted)
    for seed in range(3):
        optimizer.zero_grad()
        model(numbers(8, 3, 8, 8, seed=seed)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(before["head.0"]["weight"], adapter.copies["head.0"].weight)
    assert not torch.equal(before["head.1"]["running_mean"], adapter.copies["head.1"].running_mean)
    assert adapter.copies["head.1"].num_batches_tracked == before["head.1"]["num_batches_tracked"] + 3
    after = snapshot(model)["tensors"]
    assert all(torch.equal(t, after[k]) for k, t in kept["tensors"].items() if "deltas" not in k and "copies" not in k)


def test_statistics_of_the_frozen_base_do_not_move_in_training_mode() -> None:
    model, x = seer(), numbers(8, 3, 8, 8)
    before = snapshot(model)["tensors"]
    wanted = model(x)
    for options in ({}, {"bias": "all"}, {"extra_modules": ["norm"]}):
        name = f"n{len(options)}{'bias' in options}"
        adapter = trimtab.attach(model, SMALL, targets=["stem", "conv"], name=name, **options)
        model.train()
        if "extra_modules" not in options:
            torch.testing.assert_close(model(x), wanted)
        model(x)
        with adapter.disable():
            assert torch.equal(model(x), wanted)
        for key in ("norm.running_mean", "norm.running_var", "head.1.running_var", "norm.num_batches_tracked"):
            assert torch.equal(model.state_dict()[key], before[key]), key
        model.eval()


def test_a_frozen_norm_stays_frozen_when_another_adapter_goes() -> None:
    model, x = seer(), numbers(8, 3, 8, 8)
    whole = trimtab.attach(model, SMALL, targets="stem", extra_modules=["norm"], name="whole")
    trimtab.attach(model, SMALL, targets="stem", name="other")
    whole.remove()
    mean = model.norm.running_mean.clone()
    model.train()(x)
    assert torch.equal(model.norm.running_mean, mean)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_model_with_copies_and_norms_can_be_copied(way) -> None:
    model, x = seer(), numbers(4, 3, 8, 8)
    before = snapshot(model)
    stir(trimtab.attach(model, SMALL, targets="conv", extra_modules=["norm", "head"], bias="all"))
    twin = way(model)
    assert torch.equal(twin(x), model(x))
    trimtab.adapters(twin)["default"].remove()
    after = snapshot(twin)
    assert after["classes"] == before["classes"]
    assert after["attributes"] == before["attributes"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_with_trained_copies_compiles(backend: str) -> None:
    torch._dynamo.reset()
    model = reader()
    adapter = stir(trimtab.attach(model, SMALL, bias="all", extra_modules=["norm", "head"]))
    wanted = model(IDS)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(IDS), wanted, **SAME)
    found = torch.autograd.grad(compiled(IDS).square().sum(), adapter.parameters())
    for own, plain in zip(found, torch.autograd.grad(model(IDS).square().sum(), adapter.parameters()), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)
    with adapter.disable():
        torch.testing.assert_close(compiled(IDS), model(IDS), **SAME)


def test_two_enabled_adapters_that_replace_the_same_parameter_are_refused() -> None:
    model = reader()
    two(model, extra_modules=["head"])
    with pytest.raises(UsageError, match=r"adapters 'b' and 'a' both replace head.weight: switch to one"):
        trimtab.adapters(model)["a"].enable()
    assert not trimtab.adapters(model)["a"].enabled


def test_two_enabled_adapters_may_replace_different_parameters() -> None:
    model = reader()
    a = trimtab.attach(model, SMALL, targets="qkv", extra_modules=["norm"], name="a")
    b = trimtab.attach(model, SMALL, targets="qkv", extra_modules=["head"], name="b")
    with torch.no_grad():
        a.copies["norm"].bias += 1
        b.copies["head"].bias += 1
    bare = reader()
    with torch.no_grad():
        bare.norm.bias += 1
        bare.head.bias += 1
    a.enable()
    torch.testing.assert_close(model(IDS), bare(IDS), **SAME)


def test_tied_weights_are_trained_as_one_copy_and_never_untied() -> None:
    model = built("llama-tied")
    adapter = trimtab.attach(model, SMALL, extra_modules=["lm_head"])
    assert adapter.copies["lm_head"].weight is adapter.copies["model.embed_tokens"].weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert adapter.whole == ("lm_head", "model.embed_tokens")
    names = [name for name, _ in adapter.named_parameters()]
    assert len([n for n in names if "copy" in n]) == 1
    plain = built("llama-tied")
    with torch.no_grad():
        adapter.copies["lm_head"].weight += 0.1
        plain.lm_head.weight += 0.1
    torch.testing.assert_close(logits(model, "llama"), logits(plain, "llama"), **SAME)
    adapter.remove()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_biases_are_trained_as_one_copy() -> None:
    adapter = trimtab.attach(built("bert-masked"), SMALL, targets="cls.predictions.decoder", bias="adapter-only")
    assert adapter.copies["cls.predictions.decoder"].bias is adapter.copies["cls.predictions"].bias


def test_a_target_tied_to_an_extra_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"embed_tokens.weight is tied to a module that is trained whole"):
        trimtab.attach(built("llama-tied"), SMALL, targets=["embed_tokens", "q_proj"], extra_modules=["lm_head"])


def test_an_extra_module_without_parameters_is_refused() -> None:
    with pytest.raises(UsageError, match=r"names head.3, which has no parameters to train"):
        trimtab.attach(seer(), SMALL, targets="conv", extra_modules=["head.3"])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", [SMALL, LoRA(rank=2, dropout=0.3), Full()], ids=["lora", "dropout", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(method, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = built("llama")
        adapter = stir(trimtab.attach(model, method, extra_modules=["norm", "lm_head"]))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(8)
        model(**batch("llama")).loss.backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **SAME)
        assert one.abs().max() > 0


def test_after_step_reaches_every_delta() -> None:
    adapter = trimtab.attach(reader(), SMALL)
    seen = []
    for path, delta in adapter.deltas.items():
        delta.after_step = lambda step, weight, path=path: seen.append((path, step, weight.shape))  # type: ignore
    adapter.after_step(3)
    assert seen == [(path, 3, adapter.sites[path].weight.shape) for path in adapter.deltas]


def test_the_state_tells_a_trained_bias_from_a_factor() -> None:
    adapter = trimtab.attach(reader(), SMALL, targets="head", bias="adapter-only")
    assert list(adapter.state_dict()) == ["head.A", "head.B", "head.copy.bias"]
    assert [name for name, _ in adapter.named_parameters()] == ["head.A", "head.B", "head.copy.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.A"), "lacks 'head.A'"),
        (lambda s: s.update({"head.C": torch.ones(1)}), r"foreign 'head.C'; did you mean head"),
        (lambda s: s.update({"head.A": torch.ones(2, 7)}), r"'head.A' is \[2, 7\]"),
        (lambda s: s.update({"head.A": s["head.A"].bfloat16()}), "in torch.bfloat16 in the saved state, but"),
    ],
)
def test_a_foreign_state_is_refused_and_nothing_is_read(change, message: str) -> None:
    adapter = trimtab.attach(reader(), SMALL, targets="head")
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    state = {key: tensor + 1 for key, tensor in before.items()}
    change(state)
    with pytest.raises(UsageError, match=message):
        adapter.load_state_dict(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.state_dict().items())


def test_an_adapter_says_what_it_is() -> None:
    text = repr(trimtab.attach(reader(), SMALL, targets="head", name="sql"))
    assert text.startswith("Adapter('sql', LoRA(rank=2")
    assert text.endswith("1 modules, 22 parameters)")


def test_a_model_moved_to_another_dtype_keeps_working() -> None:
    model = reader()
    stir(trimtab.attach(model, SMALL, bias="all", extra_modules=["head"]))
    wanted = model(IDS)
    torch.testing.assert_close(model.double()(IDS).float(), wanted, **SAME)
