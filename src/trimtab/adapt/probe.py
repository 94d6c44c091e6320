"""Inputs to compare a merged model with the unmerged one on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapt.module import modes_kept

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def add(first, second):\n    return",
    "Question: How many legs does a spider have?\nAnswer:",
    "Once upon a time, in a small village by the sea,",
    "In summary, the main reason for the change was that",
    "1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The outputs on each probe, and what the probes were. tokens: whether the last dimension scores tokens."""

    tensors: tuple[Tensor, ...]
    kind: str
    tokens: bool


@torch.no_grad()
def run_probes(model: nn.Module, tokenizer: Any, probes: Sequence[Any] | None) -> Outputs:
    """The model's outputs on the probes given, on prompts in words, or on seeded inputs; none when neither fits."""
    inputs, kind = _inputs(model, tokenizer, probes)
    with modes_kept(model):
        model.eval()
        results = [_call(model, item) for item in inputs]
    return Outputs(tuple(r for r, _ in results), kind, all(t for _, t in results) and bool(results))


def _inputs(model: nn.Module, tokenizer: Any, probes: Sequence[Any] | None) -> tuple[list[Any], str]:
    device = next(model.parameters()).device
    if probes is not None:
        return list(probes), "given inputs"
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", "")
    if config is None:
        return [], "no probes: pass probes=[...] with inputs of this model"
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        if tokenizer is not None:
            ids = [torch.tensor([tokenizer(p)["input_ids"]], device=device) for p in PROMPTS]
            return [_text_input(config, i) for i in ids], f"{len(PROMPTS)} prompts"
        vocabulary = config.get_text_config().vocab_size
        random = torch.randint(vocabulary, (4, 16), generator=generator).to(device)
        return [_text_input(config, random)], "4 rows of 16 seeded token numbers"
    if name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(2, config.num_channels, height, width, generator=generator)
        return [{"pixel_values": pixels.to(device, next(model.parameters()).dtype)}], "2 seeded images"
    return [], f"no probes: pass probes=[...] with '{name}' inputs"


def _text_input(config: Any, ids: Tensor) -> dict[str, Tensor]:
    extra = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, **extra}


def _call(model: nn.Module, item: Any) -> tuple[Tensor, bool]:
    output = model(**item) if isinstance(item, Mapping) else model(*item) if isinstance(item, tuple) else model(item)
    logits = getattr(output, "logits", None)
    if logits is not None:
        return logits.float(), logits.dim() == 3
    hidden = getattr(output, "last_hidden_state", output)
    return cast("Tensor", hidden if isinstance(hidden, Tensor) else hidden[0]).float(), False


def compare(wanted: Outputs, got: Outputs) -> tuple[float | None, float | None, int]:
    """(largest absolute difference, share of positions with the same greedy token, positions)."""
    if not wanted.tensors:
        return None, None, 0
    pairs = list(zip(wanted.tensors, got.tensors, strict=True))
    difference = max((a - b).abs().max().item() for a, b in pairs)
    if not wanted.tokens:
        return difference, None, 0
    same = [a.argmax(-1) == b.argmax(-1) for a, b in pairs]
    positions = sum(s.numel() for s in same)
    return difference, sum(int(s.sum()) for s in same) / positions, positions
