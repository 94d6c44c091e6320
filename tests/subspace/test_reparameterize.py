"""A model in a subspace is the model with θ0 + P θ_d for its parameters, and nothing else of it changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from toys import batch, built, numbers, reader, seer, tokens
from trimtab.errors import UsageError
from trimtab.subspace import blocks
from trimtab.subspace.layers import layer_groups
from trimtab.subspace.reparameterize import Subspace

EXACT = {"rtol": 0.0, "atol": 0.0}


def stirred(subspace: Subspace, size: float = 0.3) -> Subspace:
    with torch.no_grad():
        for number, parameter in enumerate(subspace.trained()):
            parameter.add_(size * numbers(*parameter.shape, seed=number).to(parameter.dtype))
    return subspace


def matrix(subspace: Subspace) -> Tensor:
    """P [D, d], column by column."""
    eye = torch.eye(subspace.theta_d.numel(), dtype=subspace.theta_d.dtype)
    return torch.stack([subspace.projection.expand(column) for column in eye], dim=1)


def written(model: Any, theta: Tensor, names: tuple[str, ...]) -> Any:
    """A copy of a model with the vector θ [D] written into its parameters."""
    twin = copy.deepcopy(model)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, part in zip(names, theta.split([own[n].numel() for n in names]), strict=True):
            own[name].copy_(part.view(own[name].shape))
    return twin


@pytest.mark.parametrize("mode", ["did", "said"])
def test_it_computes_what_the_model_computes_until_it_is_trained(mode: str) -> None:
    model, x = reader(), tokens(4, 7)
    torch.testing.assert_close(Subspace.of(model, d=20, mode=mode)(x), model(x), **EXACT)


def test_did_is_theta_0_plus_p_theta_d() -> None:
    model, x = reader(), tokens(4, 7)
    subspace = stirred(Subspace.of(model, d=30, seed=3))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    theta = start + matrix(subspace) @ subspace.theta_d.detach()
    assert len(start) == subspace.D
    assert sum(p.numel() for p in subspace.trained()) == 30
    torch.testing.assert_close(subspace(x), written(model, theta, subspace.names)(x), rtol=1e-5, atol=1e-5)
    assert (subspace(x) - model(x)).abs().max() > 1e-2


def test_weights_are_kept_within_a_block_alone() -> None:
    subspace, x = stirred(Subspace.of(reader(), d=20)), tokens(4, 7)
    before = subspace(x)
    with subspace.weights_kept():
        stirred(subspace)
        torch.testing.assert_close(subspace(x), before, **EXACT)
    assert not torch.allclose(subspace(x), before)


@pytest.mark.parametrize(("layers", "m"), [(None, 5), ("tensor", 13)])
def test_said_scales_each_layer_and_pays_for_it_out_of_d(layers: str | None, m: int) -> None:
    model, x = reader(), tokens(4, 7)
    subspace = stirred(Subspace.of(model, d=30, mode="said", layers=layers))
    assert subspace.lambdas is not None
    assert (subspace.lambdas.numel(), subspace.theta_d.numel()) == (m, 30 - m)
    scale = torch.cat([subspace.lambdas[g].expand(n) for g, n in zip(subspace.groups, subspace.sizes, strict=True)])  # type: ignore[arg-type]
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    theta = start + scale * (matrix(subspace) @ subspace.theta_d)
    torch.testing.assert_close(subspace(x), written(model, theta, subspace.names)(x), rtol=1e-5, atol=1e-5)
    for few in (1, m):
        with pytest.raises(UsageError, match=f"SAID spends {m} of it on the λ of {m} layers"):
            Subspace.of(model, d=few, mode="said", layers=layers)


@pytest.mark.parametrize("mode", ["did", "said"])
def test_gradients_are_those_of_the_explicit_matrix(mode: str) -> None:
    model, x = reader().double(), tokens(4, 7)
    subspace = Subspace.of(model, d=20, mode=mode).double()
    stirred(subspace)
    names, P = subspace.names, matrix(subspace)

    def loss(theta_d: Tensor, lambdas: Tensor | None) -> Tensor:
        parts = (P @ theta_d).split(subspace.sizes)
        if lambdas is not None:
            parts = [lambdas[g] * part for g, part in zip(subspace.groups or (), parts, strict=True)]  # type: ignore[assignment]
        own = dict(model.named_parameters())
        weights = {n: own[n].detach() + part.view(own[n].shape) for n, part in zip(names, parts, strict=True)}
        out: Tensor = torch.func.functional_call(model, weights, (x,))
        return out.square().sum()

    wanted = torch.autograd.grad(loss(subspace.theta_d, subspace.lambdas), subspace.trained())
    found = torch.autograd.grad(subspace(x).square().sum(), subspace.trained())
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)
        assert own.abs().max() > 0


@pytest.mark.parametrize(("mode", "forward", "step"), [("did", 1, 2), ("said", 2, 2)])
def test_so_many_copies_of_theta_are_there_at_once(
    mode: str, forward: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside θ0, which is the model's, and what P has drawn; activations are of one row."""
    monkeypatch.setattr(blocks, "CHUNK", 2**9)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    subspace, x = Subspace.of(model, d=50, mode=mode), numbers(1, 64)
    subspace(x)  # P is drawn
    with Alive() as whole, torch.no_grad():
        subspace(x)
    assert whole.most < (forward + 0.5) * 4 * subspace.D
    with Alive() as whole:
        subspace(x).sum().backward()
    assert whole.most < (step + 0.5) * 4 * subspace.D


class Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes at once in storages that operations made, whoever holds them."""

    def __enter__(self) -> Alive:
        self.most = 0
        self._made: dict[StorageWeakRef, int] = {}
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {StorageWeakRef(a.untyped_storage()) for a in tree_leaves(args) if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and StorageWeakRef(tensor.untyped_storage()) not in before:
                self._made[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        self._made = {storage: size for storage, size in self._made.items() if not storage.expired()}
        self.most = max(self.most, sum(self._made.values()))
        return result


def test_the_model_is_neither_written_nor_given_gradients() -> None:
    model = reader()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    subspace = Subspace.of(model, d=20)
    for _ in range(3):
        subspace(tokens(4, 7)).square().sum().backward()
        torch.optim.SGD(subspace.trained(), lr=0.1).step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_tied_weights_are_one_slice_and_stay_tied() -> None:
    model = built("llama-tied")
    subspace = stirred(Subspace.of(model, d=40))
    assert sum("embed_tokens" in name or "lm_head" in name for name in subspace.names) == 1
    assert sum(p.numel() for p in model.parameters()) == subspace.D
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    twin = written(model, theta + matrix(subspace) @ subspace.theta_d.detach(), subspace.names)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    wanted = twin(**batch("llama-tied"))
    torch.testing.assert_close(subspace(**batch("llama-tied")).logits, wanted.logits, rtol=1e-5, atol=1e-5)
    # Both uses of the one slice give it a gradient.
    (found,) = torch.autograd.grad(subspace(**batch("llama-tied")).loss, [subspace.theta_d])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(wanted.loss, list(twin.parameters()))])
    torch.testing.assert_close(found, matrix(subspace).T @ gradient, rtol=1e-4, atol=1e-6)


def test_batch_norms_keep_statistics_and_modes_are_the_models_own() -> None:
    model, x = seer(), numbers(16, 3, 8, 8)
    subspace = stirred(Subspace.of(model, d=20))
    assert not subspace.training
    before = model.norm.running_mean.clone()  # type: ignore[union-attr,operator]
    quiet = subspace(x)
    assert torch.equal(model.norm.running_mean, before)  # type: ignore[arg-type]
    subspace.train()
    assert model.norm.training
    assert not torch.allclose(subspace(x), quiet)
    assert not torch.equal(model.norm.running_mean, before)  # type: ignore[arg-type]
    assert {"norm.weight", "norm.bias", "head.2.weight"} <= set(subspace.names)


def test_dropout_follows_the_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    subspace, x = Subspace.of(model, d=10), numbers(4, 6)
    assert not torch.equal(subspace(x), subspace(x))
    subspace.eval()
    assert not model[1].training
    assert torch.equal(subspace(x), subspace(x))


def test_steps_too_small_for_bf16_add_up() -> None:
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    subspace = Subspace.of(model, d=5)
    assert subspace.theta_d.dtype == torch.float32
    for step in range(1, 101):
        with torch.no_grad():
            subspace.theta_d.add_(0.01)  # an entry of P is about 0.035, and bf16 has nothing within 0.0039 of 1
        weight = subspace.weights()["weight"]
        assert weight.dtype == torch.bfloat16
        assert (step > 1) or torch.equal(weight, model.weight)
    wanted = 1 + subspace.offsets()[0].detach().view(64, 64)
    assert (wanted - 1).abs().min() > 0.03
    assert torch.equal(weight, wanted.to(torch.bfloat16))


def test_patterns_leave_parameters_out_and_they_stay_frozen() -> None:
    model, x = reader(), tokens(4, 7)
    subspace = stirred(Subspace.of(model, d=20, leave_out=("embed", "norm", "*.bias")))
    assert set(subspace.names) == {
        *(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("qkv", "out")), "head.weight",
    }  # fmt: skip
    weights = subspace.weights()
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters() if n not in subspace.names)
    subspace(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(UsageError, match="leave_out 'hed' matches no trainable parameter; did you mean head"):
        Subspace.of(model, d=20, leave_out=("hed",))
    with pytest.raises(UsageError, match="leave_out takes all 13 trainable parameters"):
        Subspace.of(model, d=20, leave_out=("*",))


def test_frozen_parameters_are_not_in_theta() -> None:
    model = reader()
    model.embed.weight.requires_grad_(False)
    assert "embed.weight" not in Subspace.of(model, d=20).names


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"d": 0}, "d is 0, but must be from 1 to 779"),
        ({"d": 780}, "d is 780, but must be from 1 to 779"),
        ({"d": 9, "mode": "sade"}, "mode is 'sade', but must be did or said"),
        ({"d": 9, "layers": "block"}, "layers is 'block', but must be 'tensor'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Subspace.of(reader(), **options)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(UsageError, match="this Reader has no trainable parameters"):
        Subspace.of(reader().requires_grad_(False), d=5)


def test_gradient_checkpointing_is_refused_and_not_wrong() -> None:
    model = built("llama")
    subspace = Subspace.of(model, d=5).train()
    model.activation_checkpointing_enable()
    with pytest.raises(UsageError, match="turn it off"):
        subspace(**batch("llama"))


def test_the_same_seed_gives_the_same_subspace_and_another_another() -> None:
    x = tokens(4, 7)
    one, same, other = (stirred(Subspace.of(reader(), d=20, seed=seed))(x) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_it_is_a_function_of_theta_d_for_torch_func() -> None:
    subspace, x = Subspace.of(reader(), d=20), tokens(4, 7)
    many = numbers(3, 20)

    def loss(theta_d: Tensor) -> Tensor:
        out: Tensor = subspace.call(subspace.weights(theta_d), x)
        return out.square().sum()

    together = torch.func.vmap(torch.func.grad(loss))(many)
    alone = torch.stack([torch.func.grad(loss)(theta_d) for theta_d in many])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["0.weight", "0.bias", "2.weight", "2.bias"], (0, 0, 1, 1)),
        (["conv1.weight", "conv1.bias", "fc.weight"], (0, 0, 1)),
        (["net.conv1.weight", "net.conv1.bias", "net.fc.weight"], (0, 0, 1)),
        (
            ["bert.embeddings.words.weight", "bert.embeddings.norm.bias", "bert.encoder.layer.0.a.b.weight",
             "bert.encoder.layer.0.c.weight", "bert.encoder.layer.1.c.weight", "bert.pooler.dense.weight",
             "classifier.weight"],
            (0, 0, 1, 1, 2, 3, 4),
        ),
        (["model.embed_tokens.weight", "model.layers.0.experts.0.w", "model.layers.0.experts.1.w",
          "model.layers.10.q.weight", "model.norm.weight", "lm_head.weight"], (0, 1, 1, 2, 3, 4)),
        (["0.auto_model.encoder.layer.0.a.weight", "0.auto_model.encoder.layer.1.a.weight", "2.linear.weight"],
         (0, 1, 2)),
        (["pos_embed", "blocks.0.w.weight", "head.weight", "head.bias"], (0, 1, 2, 2)),
    ],
)  # fmt: skip
def test_a_layer_is_a_block_the_embeddings_or_the_head(names: list[str], groups: tuple[int, ...]) -> None:
    assert layer_groups(names) == groups
