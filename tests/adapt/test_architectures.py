"""The whole life of an adapter on every kind of model: attach, train, save, load, merge, unmerge, remove."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from toys import TRANSFORMERS, assert_same, batch, built, logits, numbers, seer, snapshot, tokens
from trimtab import Full, LoRA

EXACT = {"rtol": 0.0, "atol": 0.0}


def loss(model: Any, name: str) -> Tensor:
    if name == "conv":
        target = tokens(6, vocabulary=4)
        return torch.nn.functional.cross_entropy(model(numbers(6, 3, 8, 8)), target)
    result: Tensor = model(**batch(name)).loss
    return result


def output(model: Any, name: str) -> Tensor:
    if name != "conv":
        return logits(model, name)
    with torch.no_grad():
        return model(numbers(6, 3, 8, 8))


def fresh(name: str) -> Any:
    return seer() if name == "conv" else built(name)


OPTIONS: dict[str, dict[str, Any]] = {
    "conv": {"targets": ["all-linear", "stem", "conv"], "bias": "all"},
    "bert": {"extra_modules": ["classifier"]},
    "vit": {"targets": ["all-linear", "projection"], "extra_modules": ["classifier"]},
    "gpt2": {"targets": ["c_attn", "c_fc", "wpe"], "slices": {"c_attn": (True, False, True)}, "bias": "adapter-only"},
    "llama-tied": {"extra_modules": ["embed_tokens"]},
    "qwen2": {"bias": "all"},
}


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=4.0), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("name", [*TRANSFORMERS, "conv"])
def test_the_whole_life_of_an_adapter(name: str, method, tmp_path) -> None:
    model = fresh(name)
    before, bare, start = snapshot(model), output(model, name), loss(model, name).item()

    adapter = trimtab.attach(model, method, **OPTIONS.get(name, {}))
    assert torch.equal(output(model, name), bare)
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for step in range(1, 6):
        optimizer.zero_grad()
        loss(model, name).backward()
        optimizer.step()
        adapter.after_step(step)
    model.eval()
    assert loss(model, name).item() < start - 0.01
    trained = output(model, name)
    with adapter.disable():
        assert torch.equal(output(model, name), bare)

    folder = adapter.save(tmp_path / "adapter")
    other = fresh(name)
    loaded = trimtab.load(other, folder)
    torch.testing.assert_close(output(other, name), trained, **EXACT)
    assert {key: t.shape for key, t in loaded.state_dict().items()} == {
        key: t.shape for key, t in adapter.state_dict().items()
    }

    kept = snapshot(model)
    probes = [numbers(2, 3, 8, 8)] if name == "conv" else None
    audit = trimtab.merge(adapter, probes=probes)
    # every layer adds some 1e-7 of rounding
    torch.testing.assert_close(output(model, name), trained, rtol=1e-4, atol=1e-5)
    assert len(audit.layers) == len(adapter.deltas)
    assert all(layer.relative_change > 0 and layer.error_share < 1e-2 for layer in audit.layers)
    assert audit.max_logit_difference is not None
    assert audit.max_logit_difference < 1e-4
    trimtab.unmerge(adapter)
    assert_same(kept, snapshot(model))
    torch.testing.assert_close(output(model, name), trained, **EXACT)

    adapter.remove()
    assert_same(before, snapshot(model))
    assert torch.equal(output(model, name), bare)
