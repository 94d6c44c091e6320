"""Gated layers with less memory: which are taken, and that nothing but memory changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab
from toys import built
from trimtab.models.fused import fused
from trimtab.ops import products


def gradients(model: nn.Module, adapter) -> list[torch.Tensor]:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, adapter.parameters())
    return [gradient.clone() for gradient in found]


@pytest.fixture(autouse=True)
def linear_layers_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine computes them by another library is not asked but where a test does."""
    monkeypatch.setattr(products, "BY_ONEDNN", False)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_gradients_are_the_same_and_less_is_kept(name: str) -> None:
    model = built(name)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2))
    classes = [type(module) for module in model.modules()]
    sizes = []
    # A gated layer and two norms in each of two layers, and the last norm; Gemma 2 has four norms a layer, and Qwen3
    # normalises queries and keys too.
    modules = {"llama": 7, "gemma2": 11, "qwen3": 11}

    def note(tensor):
        sizes[-1].add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        kept.append(tensor)
        return tensor

    found, kept = [], []
    for on in (False, True):
        sizes.append(set())
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            if on:
                with fused(model) as count:
                    assert count == modules[name]
                    found.append(gradients(model, adapter))
            else:
                found.append(gradients(model, adapter))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)
    plain_bytes, ours_bytes = (sum(size for _, size in each) for each in sizes)
    assert ours_bytes < plain_bytes
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_fp32_linear_layers_go_by_the_quicker_library(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama")
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(True)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2), targets=["q_proj", "v_proj"])
    plain = gradients(model, adapter)
    monkeypatch.setattr(products, "BY_ONEDNN", True)
    monkeypatch.setattr(products, "LEAST", 0)
    with fused(model) as count:
        assert count == 7 + 5 * 2 + 1  # k, o, gate, up and down of two layers, and the head
        ours = gradients(model, adapter)
    for own, quick in zip(plain, ours, strict=True):
        torch.testing.assert_close(quick, own)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("known", [set(), {torch.bfloat16}])
def test_frozen_layers_of_a_dtype_without_products_are_computed_wide(known, monkeypatch) -> None:
    monkeypatch.setattr(products, "COMPUTED_ON_CPU", known)
    model = built("llama").to(torch.bfloat16)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2), targets=["q_proj", "v_proj"])
    plain = torch.cat([g.flatten() for g in gradients(model, adapter)])
    with fused(model) as count:
        assert count == 7 + (0 if known else 5 * 2 + 1)  # k, o, gate, up and down of two layers, and the head
        ours = torch.cat([g.flatten() for g in gradients(model, adapter)])
    assert (ours - plain).norm() < 0.03 * plain.norm()  # 8 bits, through two layers and back
    assert type(model.lm_head) is nn.Linear


class Squared(nn.Module):
    """Looks like a gated layer, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) ** 2)


def test_what_computes_something_else_is_left_alone() -> None:
    model = nn.Sequential(Squared())
    with fused(model) as count:
        assert count == 0
        assert type(model[0]) is Squared


class Norm(nn.Module):
    """An RMS norm, of what is left after the mean is taken away if it is centred."""

    def __init__(self, *, scaled: bool = True, centred: bool = False) -> None:
        super().__init__()
        self.eps, self.centred = 1e-6, centred
        if scaled:
            self.weight = nn.Parameter(torch.rand(8) + 0.5, requires_grad=False)

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return y * self.weight if hasattr(self, "weight") else y


def test_modules_of_one_class_that_compute_different_things_are_told_apart() -> None:
    model = nn.ModuleList([Norm(), Norm(centred=True), Norm(scaled=False), Norm()])
    x = torch.randn(3, 8)
    plain = [module(x) for module in model]
    with fused(model) as count:
        assert count == 2
        for module, y in zip(model, plain, strict=True):
            torch.testing.assert_close(module(x), y)


class Dropping(nn.Module):
    """A gated layer that drops out, by a child or by a function, of what is between its projections."""

    def __init__(self, p: float, *, child: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn, self.p = nn.SiLU(), 0.0 if child else p
        self.dropout = nn.Dropout(p if child else 0.0)

    def forward(self, x):
        h = self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(nn.functional.dropout(h, self.p, training=self.training))


@pytest.mark.parametrize("child", [True, False])
def test_dropout_inside_a_gated_layer_stays(child: bool) -> None:
    model = nn.ModuleList([Dropping(0.0, child=child), Dropping(0.5, child=child)])
    assert model.training
    state = torch.get_rng_state()
    with fused(model) as count:
        assert count == 1
        assert type(model[1]) is Dropping
        assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapters_dropout_does_not_stand_in_the_way() -> None:
    model = built("llama")
    trimtab.attach(model, trimtab.LoRA(rank=2, dropout=0.5))
    model.train()
    with fused(model) as count:
        assert count == 7


class DownFirst(nn.Module):
    """A gated layer whose children stand in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.up_proj, self.gate_proj = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(4, 6)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_the_order_of_the_children_says_nothing() -> None:
    model = nn.Sequential(DownFirst())
    x = torch.randn(3, 4)
    plain = model(x)
    with fused(model) as count:
        assert count == 1
        torch.testing.assert_close(model(x), plain)


def test_the_models_file_has_its_own_rotation_afterwards() -> None:
    from transformers.models.llama import modeling_llama

    own, model = modeling_llama.apply_rotary_pos_emb, built("llama")
    with fused(model):
        assert modeling_llama.apply_rotary_pos_emb is not own
    assert modeling_llama.apply_rotary_pos_emb is own
    with pytest.raises(ZeroDivisionError), fused(model):
        raise ZeroDivisionError
    assert modeling_llama.apply_rotary_pos_emb is own


def test_a_model_that_rotates_by_angles_of_more_bits_computes_what_it_did() -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.Olmo2Config(**sizes, num_attention_heads=4, pad_token_id=0)
    model = transformers.Olmo2ForCausalLM(config).eval().to(torch.bfloat16)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2))
    plain = gradients(model, adapter)
    with fused(model):
        ours = gradients(model, adapter)
    for own, leaner in zip(plain, ours, strict=True):
        torch.testing.assert_close(leaner, own, rtol=0.1, atol=0.05 * float(own.abs().max()))


@pytest.mark.parametrize("name", ["gpt_neox", "glm", "gpt_oss"])
def test_a_model_that_rotates_a_part_of_a_head_computes_what_it_did(name: str) -> None:
    model = rotating_a_part(name)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2))
    plain = gradients(model, adapter)
    with fused(model):
        ours = gradients(model, adapter)
    for own, leaner in zip(plain, ours, strict=True):
        torch.testing.assert_close(leaner, own)


def rotating_a_part(name: str) -> nn.Module:
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    if name == "gpt_neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)).eval()
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 2}
    if name == "gpt_oss":  # angles for half a head, and another function of them
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
        return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **experts)).eval()
    config = transformers.GlmConfig(**sizes)
    return transformers.GlmForCausalLM(config).eval()
