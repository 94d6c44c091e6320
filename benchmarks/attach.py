"""Seconds to attach LoRA (r = 16) to the 210 linear layers of a model the size of SmolLM2-135M: trimtab and PEFT.

usage: python benchmarks/attach.py [--rounds 15] [--threads 1]

Both in one process, alternating, on the same model; each round attaches to the bare model and takes the adapter off.
Prints one JSON line with medians, quartiles and the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab


def timed(attach: Callable[[], Any], remove: Callable[[Any], None]) -> float:
    start = time.perf_counter()
    attached = attach()
    seconds = time.perf_counter() - start
    remove(attached)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(flags.threads)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    sides = {
        "trimtab": (lambda: trimtab.attach(model, trimtab.LoRA(rank=16, alpha=32)), lambda adapter: adapter.remove()),
        "peft": (lambda: get_peft_model(model, peft_config), lambda adapted: adapted.unload()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for attach, remove in sides.values():
        timed(attach, remove)  # the first call imports and caches
    for _ in range(flags.rounds):
        for name, (attach, remove) in sides.items():
            seconds[name].append(timed(attach, remove))
    result: dict[str, Any] = {"rounds": flags.rounds, "threads": flags.threads, "unit": "seconds"}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"median": round(median, 4), "quartiles": [round(low, 4), round(high, 4)]}
    result["ratio_of_medians"] = round(result["peft"]["median"] / result["trimtab"]["median"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
