"""A random subspace: one vector for all weights, drawn again from its seed, in a file of a few kilobytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tiny_training import make_examples, make_llama, whole_and_resumed
from toys import batch, built, logits, reader, stir, tokens
from trimtab.data.batch import pad
from trimtab.deltas.subspace import RandomSubspace, Space, SubspaceDelta
from trimtab.errors import FormatError, UsageError
from trimtab.subspace import linear, offsets
from trimtab.subspace.projection import PROJECTIONS, make_projection
from trimtab.train.loss import causal_loss
from trimtab.train.settings import Settings

BLOCKS = ["qkv", "out"]


def small(**options: Any) -> RandomSubspace:
    return RandomSubspace(**{"dim": 20, **options})


def space(adapter: trimtab.Adapter) -> Space:
    found: Any = next(iter(adapter.deltas.values()))
    return found.space  # type: ignore[no-any-return]


def changes(adapter: trimtab.Adapter) -> dict[str, Tensor]:
    """ΔW and Δb by path, as the deltas define them."""
    found = {}
    for path, module, delta in ((p, adapter.sites[p], d) for p, d in adapter.deltas.items()):
        weight, bias = module.weight, getattr(module, "bias", None)
        found[f"{path}.weight"] = delta.layout.shaped(delta.weight_change(weight), weight).detach()  # type: ignore[arg-type]
        if bias is not None:
            found[f"{path}.bias"] = delta.bias_change(bias).detach()  # type: ignore[union-attr]
    return found


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products with P from now on."""
    calls: list[str] = []
    apply = linear.Projection._applied

    def counting(self: Any, x: Tensor, transposed: bool) -> Tensor:
        calls.append("adjoint" if transposed else "expand")
        return apply(self, x, transposed)

    monkeypatch.setattr(linear.Projection, "_applied", counting)
    return calls


def test_the_changes_are_the_parts_of_one_expansion() -> None:
    adapter = stir(trimtab.attach(reader(), small(), targets=BLOCKS))
    own = changes(adapter)
    P = make_projection("uni", [c.numel() for c in own.values()], 20, 0)
    wanted = P.expand(space(adapter).theta_d.detach())
    assert list(own) == [f"blocks.{i}.{m}.{p}" for i in range(2) for m in BLOCKS for p in ("weight", "bias")]
    assert torch.equal(torch.cat([change.flatten() for change in own.values()]), wanted)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_any_projection_will_do(name: str, tmp_path: Path) -> None:
    model, x = reader(), tokens(4, 7)
    adapter = stir(trimtab.attach(model, small(projection=name), targets=BLOCKS))
    assert (changes(adapter)["blocks.1.out.weight"] != 0).any()
    wanted = model(x)
    loaded = reader()
    trimtab.load(loaded, adapter.save(tmp_path / "a"))
    assert torch.equal(loaded(x), wanted)
    assert set(RandomSubspace.projections) == set(PROJECTIONS)


@pytest.mark.parametrize(("layers", "m"), [("block", 2), ("tensor", 8)])
def test_said_spends_dim_on_a_factor_a_layer(layers: str, m: int) -> None:
    adapter = trimtab.attach(reader(), small(mode="said", layers=layers), targets=BLOCKS)
    own = space(adapter)
    assert own.lambdas is not None
    assert (own.lambdas.numel(), own.theta_d.numel()) == (m, 20 - m)
    assert sum(p.numel() for p in adapter.parameters()) == 20
    stir(adapter)
    scaled = changes(adapter)
    with torch.no_grad():
        factors = own.lambdas.clone()
        own.lambdas.fill_(1.0)
    plain = changes(adapter)
    assert len(factors.unique()) == m
    for (name, change), factor in zip(scaled.items(), factors.repeat_interleave(8 // m), strict=True):
        torch.testing.assert_close(change, factor * plain[name])


@pytest.mark.parametrize("mode", ["did", "said"])
def test_gradients_equal_those_of_the_explicit_matrix(mode: str) -> None:
    model, x = reader().double(), tokens(4, 7)
    adapter = stir(trimtab.attach(model, small(mode=mode), targets=BLOCKS, dtype=torch.float64))
    own, bare = space(adapter), reader().double()
    P = torch.stack([own.projection.expand(e) for e in torch.eye(own.theta_d.numel(), dtype=torch.float64)], 1)
    names = list(changes(adapter))
    start = dict(bare.named_parameters())
    twins = [p.detach().clone().requires_grad_() for p in own.trained()]
    parts = list((P @ twins[0]).split(own.sizes))
    if mode == "said":
        parts = [twins[1][group] * part for group, part in zip(own.groups or (), parts, strict=True)]
    weights = {n: start[n].detach() + part.view(start[n].shape) for n, part in zip(names, parts, strict=True)}
    output: Tensor = torch.func.functional_call(bare, weights, (x,))
    wanted = torch.autograd.grad(output.square().sum(), twins)
    found = torch.autograd.grad(model(x).square().sum(), own.trained())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_a_pass_is_one_expansion_and_one_adjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = reader(), tokens(4, 7)
    adapter = stir(trimtab.attach(model, small(), targets=BLOCKS))
    calls = counted(monkeypatch)
    for _ in range(2):  # micro-batches of one step
        model(x).sum().backward()
    assert calls == ["expand", "adjoint"] * 2
    calls.clear()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    trimtab.merge(adapter, probes=[x])
    assert calls == ["expand"]


@pytest.mark.parametrize("mode", ["did", "said"])
def test_two_passes_forward_may_come_before_their_passes_backward(mode: str) -> None:
    """As in a loss over pairs, or with gradients of two losses apart."""
    model = reader()
    adapter = stir(trimtab.attach(model, small(mode=mode), targets=BLOCKS))
    trained, (x, y) = space(adapter).trained(), (tokens(4, 7), tokens(2, 5))
    wanted = [torch.autograd.grad(model(inputs).square().sum(), trained) for inputs in (x, y)]
    first, second = (model(inputs).square().sum() for inputs in (x, y))
    for loss, own in ((first, wanted[0]), (second, wanted[1])):
        torch.testing.assert_close(torch.autograd.grad(loss, trained), own)


@pytest.mark.parametrize("write", ["in place", "data", "copied"])
def test_what_is_written_into_theta_is_seen_at_once(write: str) -> None:
    model, x = reader(), tokens(4, 7)
    theta_d = space(stir(trimtab.attach(model, small(), targets=BLOCKS))).theta_d
    with torch.no_grad():
        before = model(x)
        if write == "in place":
            theta_d.mul_(2)
        elif write == "data":
            theta_d.data.mul_(2)
        else:
            theta_d.data = theta_d.data * 2
        assert not torch.allclose(model(x), before)


def test_a_vector_put_in_its_place_gets_the_gradient() -> None:
    model, x = reader(), tokens(4, 7)
    adapter = stir(trimtab.attach(model, small(), targets=BLOCKS))
    name = "blocks.0.qkv.deltas.default.space.theta_d"
    (wanted,) = torch.autograd.grad(model(x).sum(), adapter.parameters())
    model(x)  # leaves offsets that have not been through a backward pass
    twin = space(adapter).theta_d.detach().clone()

    def loss(theta_d: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, {name: theta_d}, (x,))
        return out.sum()

    (found,) = torch.autograd.grad(loss(twin.requires_grad_()), [twin])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.func.grad(loss)(twin.detach()), wanted)


def test_a_vector_that_was_frozen_trains_once_it_is_freed() -> None:
    model, x = reader(), tokens(4, 7)
    theta_d = space(stir(trimtab.attach(model, small(), targets=BLOCKS))).theta_d
    theta_d.requires_grad_(False)
    model(x)
    theta_d.requires_grad_(True)
    model(x).sum().backward()
    assert theta_d.grad is not None


def test_the_vector_is_held_once() -> None:
    model = reader()
    adapter = trimtab.attach(model, small(mode="said"), targets=BLOCKS)
    first = "blocks.0.qkv.space"
    assert [name for name, _ in adapter.named_parameters()] == [f"{first}.theta_d", f"{first}.lambdas"]
    assert set(adapter.state_dict()) == {f"{first}.{name}" for name in ("theta_d", "lambdas", "order", "drawn")}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20
    twin = copy.deepcopy(model)
    shared = {id(d.space) for d in trimtab.adapters(twin)["default"].deltas.values()}  # type: ignore[union-attr]
    assert len(shared) == 1
    assert id(space(adapter)) not in shared


def test_a_file_for_a_thousand_numbers_is_a_few_kilobytes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 40}  # 280 weights
    model = make_llama(**sizes)
    adapter = stir(trimtab.attach(model, RandomSubspace(dim=1000)))
    folder = adapter.save(tmp_path / "a")
    assert len(adapter.deltas) == 280
    assert (folder / "adapter_model.safetensors").stat().st_size < 5000
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12_000
    other = make_llama(**sizes)
    loaded = trimtab.load(other, folder)
    assert list(loaded.deltas) == list(adapter.deltas)
    assert torch.equal(logits(other, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_an_adapter_of_another_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = built("llama")
    adapter = stir(trimtab.attach(model, small(mode="said"), dtype=dtype))
    other = built("llama")
    loaded = trimtab.load(other, adapter.save(tmp_path / "a"))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(logits(other, "llama"), logits(model, "llama"))


def test_small_steps_over_a_bf16_base_add_up() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
    adapter = trimtab.attach(model, small(dim=5), targets="0")
    x, theta_d = torch.eye(64, dtype=torch.bfloat16), space(adapter).theta_d
    for step in range(1, 101):
        with torch.no_grad():
            theta_d.add_(0.01)  # an entry of P is about 0.035, and bf16 has nothing within 0.0039 of 1
            seen = model(x)
        assert step > 1 or (seen == 1).all()
    wanted = 1 + changes(adapter)["0.weight"]
    assert (wanted - 1).abs().min() > 0.03
    assert torch.equal(seen.T, wanted.to(torch.bfloat16))


def test_a_merge_is_audited_and_biases_are_merged_too() -> None:
    model = built("gpt2")
    adapter = stir(trimtab.attach(model, small()))
    unmerged = logits(model, "gpt2")
    audit = trimtab.merge(adapter)
    assert {layer.name for layer in audit.layers} == {*adapter.deltas, *(f"{p}.bias" for p in adapter.deltas)}
    assert all(layer.relative_change > 0 for layer in audit.layers)
    torch.testing.assert_close(logits(model, "gpt2"), unmerged, rtol=1e-4, atol=1e-5)
    trimtab.unmerge(adapter)
    assert torch.equal(logits(model, "gpt2"), unmerged)


def test_tied_weights_are_one_part_and_stay_tied_when_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, targets = built("llama-tied"), ["all-linear", "embed_tokens", "lm_head"]
    adapter = stir(trimtab.attach(model, small(), targets=targets))
    D = sum(p.numel() for name, p in built("llama-tied").named_parameters() if "norm" not in name)
    assert space(adapter).projection.D == D
    own = changes(adapter)
    assert torch.equal(own["model.embed_tokens.weight"], own["lm_head.weight"])
    assert "shares its weight" not in caplog.text
    unmerged, base = logits(model, "llama-tied"), model.lm_head.weight
    audit = trimtab.merge(adapter)
    assert model.lm_head.weight is model.model.embed_tokens.weight is not base
    assert len(audit.layers) == len(adapter.deltas) - 1
    torch.testing.assert_close(logits(model, "llama-tied"), unmerged, rtol=1e-4, atol=1e-5)
    trimtab.unmerge(adapter)
    assert model.lm_head.weight is model.model.embed_tokens.weight is base
    folder = adapter.save(tmp_path / "a")
    trimtab.load(built("llama-tied"), folder)
    with pytest.raises(FormatError, match="trained for other weights"):
        trimtab.load(built("llama"), folder, any_base=True)
    alone = stir(trimtab.attach(built("llama-tied"), small(), targets=["embed_tokens"]))
    assert "model.embed_tokens shares its weight with lm_head" in caplog.text
    with pytest.raises(UsageError, match="would change both or untie them"):
        trimtab.merge(alone)


@pytest.mark.parametrize("mode", ["did", "said"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(mode: str, tmp_path: Path) -> None:
    def attach() -> trimtab.Adapter:
        return trimtab.attach(make_llama(), small(mode=mode))

    fresh = attach().state_dict()
    whole, resumed = whole_and_resumed(attach, tmp_path, stop=2, batch_size=4, max_steps=4)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    moved = [key for key, tensor in whole.items() if not torch.equal(tensor, fresh[key])]
    assert {key.rpartition(".")[2] for key in moved} == ({"theta_d"} if mode == "did" else {"theta_d", "lambdas"})


def test_training_lowers_the_loss() -> None:
    result = trimtab.fit(
        trimtab.attach(make_llama(), small(dim=300)),
        make_examples(),
        Settings(batch_size=5, max_steps=60, lr=0.1),
        eval_examples=make_examples(),
    )
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < 0.9 * result.eval_loss_before


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens", "lm_head"], ["lm_head"]], ids=str)
def test_the_gradient_through_an_adapted_head_is_whole(targets: list[str]) -> None:
    model = make_llama()
    adapter = stir(trimtab.attach(model, small(mode="said"), targets=targets))
    examples = make_examples(3)
    found = torch.autograd.grad(causal_loss(model, pad(examples, 0)), adapter.parameters())
    total = torch.zeros(())
    for example in examples:
        nats = -model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        places = [i for i in range(1, len(example.input_ids)) if example.supervised[i]]
        total = total + sum(nats[i - 1, example.input_ids[i]] for i in places)
    wanted = torch.autograd.grad(total, adapter.parameters())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["did", "said"])
def test_recomputed_activations_give_the_same_gradients(mode: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = built("llama").train()
        adapter = stir(trimtab.attach(model, small(mode=mode)))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        found.append(torch.autograd.grad(model(**batch("llama")).loss, adapter.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def drawn_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a torch whose generator gives other numbers."""
    draw: Callable[..., Any] = make_projection
    monkeypatch.setattr(offsets, "make_projection", lambda n, sizes, d, seed, **o: draw(n, sizes, d, seed + 100, **o))


def test_another_draw_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stir(trimtab.attach(reader(), small(), targets=BLOCKS)).save(tmp_path / "a")
    drawn_otherwise(monkeypatch)
    with pytest.raises(FormatError, match="belongs to another P than projection_seed 0 gives"):
        trimtab.load(reader(), folder)


@pytest.mark.parametrize("projection", ["uni", "dense"])
def test_another_draw_of_few_directions_is_refused(projection: str, tmp_path: Path) -> None:
    for dim in (1, 2):
        model, method = reader(), RandomSubspace(dim=dim, projection=projection)
        folder = stir(trimtab.attach(model, method, targets=BLOCKS)).save(tmp_path / str(dim))
        settings = json.loads((folder / "trimtab.json").read_text())
        trimtab.load(reader(), folder)
        for seed in range(1, 40):
            changed = json.dumps(settings).replace('"projection_seed": 0', f'"projection_seed": {seed}')
            (folder / "trimtab.json").write_text(changed)
            with pytest.raises(FormatError, match="belongs to another P"):
                trimtab.load(reader(), folder)


def test_a_run_is_not_resumed_with_another_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attach() -> trimtab.Adapter:
        if (tmp_path / "cut" / "checkpoints").exists():
            drawn_otherwise(monkeypatch)
        return trimtab.attach(make_llama(), small())

    with pytest.raises(FormatError, match="belongs to another P"):
        whole_and_resumed(attach, tmp_path, stop=2, batch_size=4, max_steps=3)


def test_another_base_is_refused(tmp_path: Path) -> None:
    folder = stir(trimtab.attach(reader(), small(), targets=BLOCKS)).save(tmp_path / "a")
    with pytest.raises(FormatError, match="was made on another base"):
        trimtab.load(reader(seed=1), folder)
    trimtab.load(reader(seed=1), folder, any_base=True)


def test_a_base_of_more_or_fewer_layers_is_refused(tmp_path: Path) -> None:
    folder = stir(trimtab.attach(make_llama(), small())).save(tmp_path / "a")
    for count in (1, 3):
        with pytest.raises(FormatError, match="trained for other weights, or for these in another order"):
            trimtab.load(make_llama(num_hidden_layers=count), folder, any_base=True)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dim": 0}, "dim is 0, but must be a whole number of at least 1"),
        ({"mode": "sad"}, "mode is 'sad', but must be one of did, said"),
        ({"projection": "haar"}, "projection is 'haar', but must be one of uni"),
        ({"layers": "head"}, "layers is 'head', but must be one of block, tensor"),
        ({"projection_seed": -1}, "projection_seed is -1, but must be at least 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        small(**options)


def test_more_dimensions_than_entries_are_refused_and_nothing_is_changed() -> None:
    model = reader()
    before = [*model.state_dict()]
    with pytest.raises(UsageError, match="d is 577, but must be from 1 to 576"):
        trimtab.attach(model, small(dim=577), targets=BLOCKS)
    with pytest.raises(UsageError, match="SAID spends 2 of it"):
        trimtab.attach(model, small(dim=2, mode="said"), targets=BLOCKS)
    assert [*model.state_dict()] == before
    assert not trimtab.adapters(model)


def test_a_checkpoint_is_not_looked_at_without_its_adapter_folder(tmp_path: Path) -> None:
    from trimtab.analyze.changes import load_checkpoint

    adapter = trimtab.attach(make_llama(), small())
    trimtab.fit(adapter, make_examples(), Settings(batch_size=5, max_steps=1, save_every=1), out=tmp_path / "run")
    with pytest.raises(UsageError, match="give the adapter folder of its run"):
        load_checkpoint(make_llama(), next((tmp_path / "run" / "checkpoints").iterdir()))


def test_parts_of_a_fused_projection_share_the_vector_too(tmp_path: Path) -> None:
    model, x = reader(), tokens(4, 7)
    adapter = stir(trimtab.attach(model, small(), targets="qkv", slices={"qkv": (True, False, True)}))
    parts = [site.delta for site in adapter.weights()]
    assert len(parts) == 4
    spaces = {part.space for part in parts if isinstance(part, SubspaceDelta)}
    assert [own.projection.D for own in spaces] == [2 * (2 * 8 * 8 + 2 * 8)]
    other = reader()
    trimtab.load(other, adapter.save(tmp_path / "a"))
    assert torch.equal(other(x), model(x))


def test_every_projection_there_is_can_be_named() -> None:
    assert set(RandomSubspace.projections) == set(PROJECTIONS)
