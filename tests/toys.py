"""Tiny seeded models and modules that the tests of several rooms share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from trimtab.adapt.adapter import Adapter
from trimtab.deltas import method_class
from trimtab.deltas.layout import layout_of
from trimtab.deltas.method import Method


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, vocabulary: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def gpt2_layer() -> nn.Module:
    layer = Conv1D(6, 5)
    nn.init.normal_(layer.bias)
    return layer


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(5, 6), lambda: numbers(4, 3, 5)),
    "linear-without-bias": (lambda: nn.Linear(5, 6, bias=False), lambda: numbers(4, 5)),
    "gpt2-conv1d": (gpt2_layer, lambda: numbers(4, 3, 5)),
    "embedding": (lambda: nn.Embedding(20, 6, padding_idx=1), lambda: tokens(4, 7)),
    "scaled-embedding": (lambda: BartScaledWordEmbedding(20, 6, 1, embed_scale=2.4494), lambda: tokens(4, 7)),
    "rounded-embedding": (lambda: Gemma3TextScaledWordEmbedding(20, 6, 1, 2.4494), lambda: tokens(4, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: numbers(4, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), lambda: numbers(4, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), lambda: numbers(4, 2, 4, 5, 4)),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), lambda: numbers(4, 4, 6, 6)),
    "conv1d-dilated": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding="same"), lambda: numbers(4, 4, 9)),
    "conv2d-reflected": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        lambda: numbers(4, 4, 6, 6),
    ),
}
"""Every kind of module a delta goes on, as (how to make it, how to make its input)."""


class Holder(nn.Module):
    """A model around one module."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def holder(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Holder, Tensor]:
    """(a model around one module of a kind, an input)."""
    torch.manual_seed(1)
    make, make_input = MODULES[kind]
    x = make_input()
    return Holder(make().to(dtype)), x.to(dtype) if x.is_floating_point() else x


def small(name: str) -> Method:
    """A registered method, small enough for the tiny modules and unlike its defaults where it has a rank."""
    cls = method_class(name)
    fields = {field.name for field in dataclasses.fields(cls)}
    sizes = {"rank": 2, "alpha": 6.0, "directions": 2, "warm_up_steps": 1, "target_rank": 1, "width": 2, "dim": 12}
    return cls(**{key: value for key, value in sizes.items() if key in fields})  # type: ignore[arg-type]


def fits(name: str, kind: str) -> bool:
    """Whether a registered method can be put on a kind of module."""
    layout = layout_of(MODULES[kind][0]())
    assert layout is not None
    return small(name).unfit(layout) is None


@torch.no_grad()
def stir(adapter: Adapter, seed: int = 7, size: float = 0.3) -> Adapter:
    """Give an adapter a change that is not zero, as training would."""
    for number, parameter in enumerate(adapter.parameters()):
        parameter.add_(size * numbers(*parameter.shape, seed=seed + number).to(parameter.dtype))
    adapter.after_step(1)
    return adapter


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


class Reader(nn.Module):
    """Token numbers [batch, length] → logits [batch, 3]: an embedding, two blocks and a head. No transformers model."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


class Seer(nn.Module):
    """Images [batch, 3, 8, 8] → logits [batch, 4]: convolutions, batch norms and a head of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        out: Tensor = self.head(self.conv(x).mean((2, 3)))
        return out


class Awkward(nn.Module):
    """Modules whose names are trimtab's and PEFT's own words."""

    def __init__(self) -> None:
        super().__init__()
        self.deltas = nn.ModuleDict({"copies": nn.Linear(4, 4), "lora_A": nn.Linear(4, 4)})
        self.lora = nn.Linear(4, 4)
        self.weight = nn.Linear(4, 4)
        self.default = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.deltas["copies"], self.deltas["lora_A"], self.lora, self.weight, self.default):
            x = layer(x)
        return x


def reader(seed: int = 0) -> Reader:
    torch.manual_seed(seed)
    return Reader().eval()


def seer(seed: int = 0) -> Seer:
    torch.manual_seed(seed)
    model = Seer()
    model(numbers(16, 3, 8, 8, seed=5))  # so that the running statistics are not those of a fresh model
    return model.eval()


_BUILT: dict[str, Any] = {}


def built(name: str) -> Any:
    """A copy of a tiny transformers model, built once. In eval mode, in fp32."""
    if name not in _BUILT:
        torch.manual_seed(3)
        _BUILT[name] = _build(name).eval()
        for number, (path, parameter) in enumerate(_BUILT[name].named_parameters()):
            if path.endswith("bias"):
                parameter.data = 0.1 * numbers(*parameter.shape, seed=number)
    return copy.deepcopy(_BUILT[name])


def _build(name: str) -> Any:
    import transformers as t

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = {**sizes, "vocab_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder)),
        "llama-tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder, tie_word_embeddings=True)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**decoder)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**decoder, head_dim=4)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**decoder, head_dim=4, query_pre_attn_scalar=4)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=48, n_positions=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        ),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**sizes, vocab_size=48, num_labels=3)),
        "bert-masked": lambda: t.BertForMaskedLM(t.BertConfig(**sizes, vocab_size=48)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=48, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)),
    }
    return makers[name]()


TRANSFORMERS = ("llama", "llama-tied", "qwen2", "qwen3", "gpt2", "bert", "t5", "vit")


def batch(name: str, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """An input of a tiny transformers model, labels included."""
    if name == "vit":
        return {"pixel_values": numbers(rows, 3, 8, 8, seed=seed), "labels": tokens(rows, vocabulary=3, seed=seed)}
    ids = tokens(rows, 10, vocabulary=48, seed=seed)
    return {"input_ids": ids, "labels": tokens(rows, vocabulary=3, seed=seed) if name == "bert" else ids}


@torch.no_grad()
def logits(model: Any, name: str, rows: int = 3, seed: int = 0) -> Tensor:
    """The logits of a tiny transformers model on `batch`."""
    result: Tensor = model(**batch(name, rows, seed)).logits
    return result


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that removing must restore: classes, attributes, tensors bit for bit, what is trainable."""
    return {
        "classes": {path: type(module) for path, module in model.named_modules()},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "children": {path: sorted(module._modules) for path, module in model.named_modules()},
        "modes": {path: module.training for path, module in model.named_modules()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "places": {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "keys": list(model.state_dict()),
        "tensors": {key: tensor.clone() for key, tensor in model.state_dict().items()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two snapshots agree in everything, tensors bit for bit."""
    for part, value in before.items():
        if part == "tensors":
            for key, tensor in value.items():
                assert torch.equal(tensor, after[part][key]), key
                assert tensor.dtype == after[part][key].dtype, key
        else:
            assert value == after[part], part


def losses_of(model: nn.Module, parameters: Sequence[nn.Parameter], lr: float) -> list[float]:
    """The losses of three steps of plain gradient descent on one batch."""
    optimizer, losses = torch.optim.SGD(parameters, lr=lr), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
