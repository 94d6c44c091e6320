"""A frozen output head takes slices of hidden states without a copy of its weight."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import trimtab
from toys import built, reader
from trimtab import LoRA

SMALL = LoRA(rank=2)


class Seen(TorchDispatchMode):
    """The names of the operations of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def last_tokens(model: nn.Module) -> torch.Tensor:
    hidden = torch.randn(2, 5, head(model).in_features, generator=torch.Generator().manual_seed(0))
    return hidden[:, -1:, :]


def head(model: Any) -> nn.Linear:
    found: nn.Linear = model.get_output_embeddings()
    return found


@torch.no_grad()
@pytest.mark.parametrize("targets", ["all-linear", "lm_head"])
def test_the_last_token_goes_through_it_as_one_matrix(targets: str) -> None:
    model = built("llama")
    x = last_tokens(model)
    wanted = head(model)(x)
    adapter = trimtab.attach(model, SMALL, targets=targets)
    with Seen() as seen:
        y = head(model)(x)
    assert "mm" in seen.names
    assert "bmm" not in seen.names
    torch.testing.assert_close(y, wanted)
    adapter.remove()
    with Seen() as bare:
        head(model).requires_grad_(False)(x)
    assert "bmm" in bare.names  # what torch does by itself


def test_with_the_last_adapter_the_hook_goes() -> None:
    model = built("llama")
    first, second = (trimtab.attach(model, SMALL, name=name) for name in "ab")
    assert len(head(model)._forward_pre_hooks) == 1
    twin = copy.deepcopy(model)
    first.remove()
    second.remove()
    assert not head(model)._forward_pre_hooks
    for adapter in list(trimtab.adapters(twin).values()):
        assert len(head(twin)._forward_pre_hooks) == 1
        adapter.remove()
    assert not head(twin)._forward_pre_hooks


def test_a_pickled_model_keeps_it() -> None:
    model = built("llama")
    trimtab.attach(model, SMALL)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert len(head(again)._forward_pre_hooks) == 1
    trimtab.adapters(again)["default"].remove()
    assert not head(again)._forward_pre_hooks


def test_a_model_without_an_output_head_has_none() -> None:
    model = reader()
    trimtab.attach(model, SMALL)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_head_that_was_replaced_is_let_go() -> None:
    model: Any = built("llama")
    adapter = trimtab.attach(model, SMALL)
    old = head(model)
    model.lm_head = nn.Linear(old.in_features, old.out_features, bias=False)
    again = copy.deepcopy(model)
    torch.save(again, io.BytesIO())
    adapter.remove()
    trimtab.adapters(again)["default"].remove()
    assert not head(model)._forward_pre_hooks


def test_a_model_that_knows_of_no_head_is_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(self: Any) -> None:
        raise NotImplementedError

    model: Any = built("llama")
    monkeypatch.setattr(type(model), "get_output_embeddings", unknown)
    for targets in ("q_proj", "all-linear"):
        adapter = trimtab.attach(model, SMALL, targets=targets)
        assert any(path.endswith("q_proj") for path in adapter.deltas)
        assert not any(module._forward_pre_hooks for module in model.modules())
        adapter.remove()
