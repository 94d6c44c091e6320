"""The last feed-forward at the positions that are read: the same loss and gradients, from fewer rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab
from toys import built
from trimtab.data.batch import Batch
from trimtab.data.encode import Example
from trimtab.data.pack import pack
from trimtab.models import readout
from trimtab.models.last_layer import at_positions, last_feed_forward
from trimtab.models.readout import readout_of
from trimtab.train.loss import causal_loss


def batch() -> Batch:
    supervised = [False, False, True, False, False, True]
    return pack([Example([1, 2, 3, 4, 5, 6], supervised, 1, 0, False)])


def rows_seen(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
def test_loss_and_gradients_stay_and_the_layer_sees_the_read_positions_alone(name: str, monkeypatch) -> None:
    model = built(name)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2), seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    found = readout_of(model)
    assert found is not None
    assert found.last is last_feed_forward(model.base_model)
    inner = next(m for m in found.last.modules() if getattr(m, "weight", None) is not None)
    seen, results = rows_seen(inner), []
    for few in (0.7, 0.0):
        monkeypatch.setattr(readout, "FEW", few)
        loss = causal_loss(model, batch())
        results.append([loss.detach(), *torch.autograd.grad(loss, adapter.parameters())])
    assert seen == [2, 5]
    for ours, whole in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)


def test_it_is_left_alone_where_it_mixes_positions() -> None:
    model = built("llama")

    class Mixing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(-2)

    model.model.layers[-1].mlp = Mixing()
    found = readout_of(model)
    assert found is not None
    assert found.last is None


def test_positions_elsewhere_are_zero_and_hooks_are_gone_afterwards() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(2, 4, 3)
    with at_positions(layer, torch.tensor([1, 6])):
        y = layer(x)
    whole = layer(x)
    assert y.shape == whole.shape
    torch.testing.assert_close(y.flatten(0, 1)[[1, 6]], whole.flatten(0, 1)[[1, 6]])
    assert y.count_nonzero() == 4


def test_layers_that_run_again_in_backward_are_computed_whole() -> None:
    results = []
    for again in (False, True):
        model = built("llama").train()
        adapter = trimtab.attach(model, trimtab.LoRA(rank=2), seed=1)
        found = readout_of(model)
        assert found is not None
        assert found.last is not None
        seen = rows_seen(found.last.gate_proj)
        if again:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        loss = causal_loss(model, batch())
        results.append([loss.detach(), *torch.autograd.grad(loss, adapter.parameters())])
        assert seen == ([5, 5] if again else [2])  # forward, and once more in backward
    for again_, once in zip(*results, strict=True):
        torch.testing.assert_close(again_, once, rtol=1e-5, atol=1e-6)
