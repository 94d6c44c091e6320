"""Seconds of one training step at a fixed length, every token supervised: trimtab, PEFT and the floor, in turn.

usage: python benchmarks/step.py --model DIR [--rounds 9] [--threads 1] [--batch 4] [--length 256] [--dtype float32]
    [--compile]

The floor is the frozen model: forward and backward to its input embeddings, with its head and loss ("floor") and
without ("floor without head"). Each side is a process of its own, set up as it sets itself up; they take turns, a step
of each in every round, and no prefix is shared. Prints one JSON line with quartiles and ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # for all sides: threads that spin cost on shared cores

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import trimtab
from trimtab.data.encode import Example
from trimtab.models.fused import fused
from trimtab.train.loss import causal_loss
from trimtab.train.machine import spare_memory
from trimtab.train.packing import packing_for

Step = Callable[[], None]


def floors(model: Any, ids: Tensor) -> tuple[Step, Step]:
    model.requires_grad_(False).train()

    def embedded() -> Tensor:
        found: Tensor = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        return found

    def with_head() -> None:
        model(inputs_embeds=embedded(), labels=ids, use_cache=False).loss.backward()

    def without() -> None:
        hidden = model.base_model(inputs_embeds=embedded(), use_cache=False).last_hidden_state
        hidden.backward(torch.ones_like(hidden))

    return with_head, without


def by_peft(model: Any, ids: Tensor) -> Step:
    adapted: Any = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-4)

    def step() -> None:
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_trimtab(model: Any, ids: Tensor) -> Step:
    adapter = trimtab.attach(model, trimtab.LoRA(rank=16, alpha=32))
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-4, fused=True)
    examples = [Example(row.tolist(), [True] * len(row), i, 0, False) for i, row in enumerate(ids)]
    packing = packing_for(adapter, "auto", examples)
    batch = packing.build(examples, 0)

    def step() -> None:
        with fused(model), packing.on(model):
            (causal_loss(model, batch) / batch.supervised_tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def serve(side: str, flags: argparse.Namespace, wire: Any) -> None:
    """A process of one side: a step and its seconds for every word that comes in."""
    if side == "trimtab":
        spare_memory()  # as its command line does
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype))
    ids = torch.randint(0, model.config.vocab_size, (flags.batch, flags.length))
    step = SIDES[side](model, ids)
    for layer in model.model.layers if flags.compile else ():
        layer.compile()
    while wire.recv():
        start = time.perf_counter()
        step()
        wire.send(time.perf_counter() - start)


SIDES: dict[str, Callable[[Any, Tensor], Step]] = {
    "trimtab": by_trimtab,
    "floor": lambda model, ids: floors(model, ids)[0],
    "peft": by_peft,
    "floor without head": lambda model, ids: floors(model, ids)[1],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="every layer of every side, by inductor")
    flags = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    wires = {}
    for side in SIDES:
        wires[side], theirs = context.Pipe()
        context.Process(target=serve, args=(side, flags, theirs), daemon=True).start()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for round_ in range(flags.rounds + 1):
        for side, wire in wires.items():
            wire.send(True)
            took = wire.recv()
            if round_:  # the first step of each warms up
                seconds[side].append(took)
    for wire in wires.values():
        wire.send(False)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    print(
        json.dumps(
            {
                **vars(flags),
                "model": os.path.basename(os.path.normpath(flags.model)),
                "quartiles": {
                    side: [round(q, 3) for q in statistics.quantiles(t, method="inclusive")]
                    for side, t in seconds.items()
                },
                "peft_over_trimtab": round(medians["peft"] / medians["trimtab"], 3),
                "trimtab_over_floor": round(medians["trimtab"] / medians["floor"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
