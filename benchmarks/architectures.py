"""Every causal model of transformers that can be built small: loss and gradient as training computes them, and plainly.

usage: python benchmarks/architectures.py [--only LlamaForCausalLM ...] [--out benchmarks/results/architectures.jsonl]

A model of two layers with random weights, a LoRA on all its linear layers, seven examples that share beginnings. The
reference is plain transformers: each example by itself, no positions, no mask, all logits. Against it stand batches as
`fit` makes them by default, the same in parts of four, and padded ones in parts of three; leaner layers in all. A line
of the file is a model and a dtype, with the largest difference of the three; or the reason why there is none.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import trimtab
from trimtab.adapt.adapter import Adapter
from trimtab.data.encode import Example
from trimtab.files import write_whole
from trimtab.train.loss import causal_loss
from trimtab.train.packing import Packing, packing_for
from trimtab.train.plan import micro_batches
from trimtab.train.settings import Settings
from trimtab.train.trial import Means, agrees

VOCABULARY, LARGEST, SECONDS = 97, 3_000_000, 20
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
    **{"initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2},
    **{"topk_group": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "q_lora_rank": 8},
    **{"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
WAYS = (("auto", None), ("auto", 4), ("pad", 3))
"""Packing and micro-batch."""
Answer = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "architectures.jsonl")
    asked = parser.parse_args()
    transformers_logging.set_verbosity_error()
    rows = []
    for config, kinds in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        kind = kinds[0] if isinstance(kinds, tuple) else kinds
        if asked.only and kind.__name__ not in asked.only:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            about = {"config": config.__name__, "model": kind.__name__, "dtype": str(dtype).removeprefix("torch.")}
            row = {**about, **looked_at(config, kind, dtype)}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if "not built" in row:
                break
    write_whole(asked.out, "".join(json.dumps(row) + "\n" for row in rows))
    for name in ("float32", "bfloat16"):
        own = [row for row in rows if row["dtype"] == name and row.get("trial")]
        loss, gradient = (max((row[what] for row in own), default=0.0) for what in ("loss", "gradient"))
        print(f"{name}: {len(own)} models, loss {loss:.1e} and gradient {gradient:.1e} apart at most")
    for row in rows:
        if "not built" not in row and not row.get("trial"):
            print(f"{row['config']} {row['dtype']}: {row.get('failed', 'computed plainly')}")


def looked_at(config: type, kind: type, dtype: torch.dtype) -> dict[str, Any]:
    """The differences of one model, or why there are none."""
    try:
        with at_most(SECONDS):
            model = built(config, kind).to(dtype)
            model(input_ids=torch.tensor([[3, 4, 5]]))
    except Exception as error:
        return {"not built": told(error)}
    try:
        with at_most(3 * SECONDS):
            adapter = stirred(trimtab.attach(model, trimtab.LoRA(rank=1, alpha=4)))
            return differences(adapter, related())
    except Exception as error:
        return {"failed": told(error)}


def built(config: Any, kind: Any) -> Any:
    """The model small, or an error."""
    usual = config()
    fixed = {key for key in SIZES if isinstance(getattr(config, key, None), property)}
    sizes = {key: value for key, value in SIZES.items() if hasattr(usual, key) and key not in fixed}
    if hasattr(usual, "kv_lora_rank"):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    small = config(**sizes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(small).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = kind(small).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that do something
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def stirred(adapter: Adapter) -> Adapter:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return adapter


def related() -> list[Example]:
    """Examples of 8 to 24 tokens, some of which begin alike."""
    draw, found = random.Random(0), []
    beginnings = [[draw.randrange(3, VOCABULARY) for _ in range(6)] for _ in range(2)]
    for row, length in enumerate((24, 15, 22, 9, 8, 23, 12), 1):
        ids = [*beginnings[row % 2], *(draw.randrange(3, VOCABULARY) for _ in range(length - 6))]
        found.append(Example(ids, [i >= length // 2 for i in range(length)], row, 0, False))
    return found


def differences(adapter: Adapter, examples: Sequence[Example]) -> dict[str, Any]:
    """Of the loss and the gradient, relative, the largest of all ways."""
    adapter.model.eval()  # the models' own dropout is random
    wanted, apart, told = plain(adapter, examples), [], {}
    for name, size in WAYS:
        packing = packing_for(adapter, name, examples)
        if name == "auto":
            told = {"packing": packing.name, "trial": agrees(adapter.model, adapter.parameters(), examples, packing)}
        ours = by_trimtab(adapter, examples, packing, size or len(examples))
        apart.append([float((a - b).norm() / b.norm()) for a, b in zip(ours, wanted, strict=True)])
    loss, gradient = map(max, zip(*apart, strict=True))
    return {**told, "loss": loss, "gradient": gradient}


def plain(adapter: Adapter, examples: Sequence[Example]) -> Answer:
    losses = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        at = [i for i in range(1, len(example.input_ids)) if example.supervised[i]]
        logits = adapter.model(input_ids=ids, use_cache=False).logits[0].float()
        losses.append(F.cross_entropy(logits[[i - 1 for i in at]], ids[0, at], reduction="sum"))
    return answer(adapter, losses)


def by_trimtab(adapter: Adapter, examples: Sequence[Example], packing: Packing, size: int) -> Answer:
    settings = Settings(batch_size=len(examples), micro_batch=size)
    with Means(packing).on(adapter.model):
        parts = micro_batches(examples, range(len(examples)), settings, packing)
        return answer(adapter, [causal_loss(adapter.model, part) for part in parts])


def answer(adapter: Adapter, losses: Sequence[Tensor]) -> Answer:
    loss, trained = torch.stack(list(losses)).sum(), adapter.parameters()
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
    return loss.detach().double(), torch.cat([g.flatten().double() for g in whole])


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TimeoutError where the block takes longer."""

    def late(*_given: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
