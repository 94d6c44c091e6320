"""Seconds of decoding, and of scoring four-choice questions: trimtab beside PEFT and the bare model, in turn.

usage: python benchmarks/inference.py --model DIR [--rounds 9] [--threads 1] [--tokens 32] [--questions 24]
    [--dtype float32]

Decoding: greedy, batch 1, by transformers' generate on both sides. Scoring: the questions shipped with trimtab, against
one full forward for each choice. Prints one JSON line with medians, quartiles and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab
from trimtab.tasks.knowledge import questions
from trimtab.tasks.likelihood import choice_scores, prompt_of


def decoding(model: Any, ids: torch.Tensor, tokens: int) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    return run


def one_by_one(model: Any, tokenizer: Any, asked: Any) -> list[list[float]]:
    """The log-likelihood of each choice, by a full forward of its own."""
    found = []
    for question in asked:
        prompt = prompt_of(question)
        before = len(tokenizer(prompt)["input_ids"])
        row = []
        for choice in question.choices:
            ids = torch.tensor([tokenizer(f"{prompt} {choice}")["input_ids"]])
            nats = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
            row.append(nats[before - 1 :].sum().item() / len(f" {choice}".encode()))
        found.append(row)
    return found


def timed(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Quartiles of each side's seconds, a run of each in every round."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: [round(q, 4) for q in statistics.quantiles(times)] for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    tokenizer = AutoTokenizer.from_pretrained(flags.model)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype)).eval()

    base, adapted, merged = load(), load(), load()
    trimtab.attach(adapted, trimtab.LoRA(rank=16, alpha=32))
    trimtab.merge(stirred(trimtab.attach(merged, trimtab.LoRA(rank=16, alpha=32))))
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    by_peft = get_peft_model(load(), config).eval()
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    models = {"base": base, "merged": merged, "unmerged": adapted, "peft": by_peft}
    decode = timed({name: decoding(model, ids, flags.tokens) for name, model in models.items()}, flags.rounds)

    asked = questions()[: flags.questions]
    with torch.no_grad():
        wanted = one_by_one(base, tokenizer, asked)
        got = choice_scores(base, tokenizer, asked)
        pairs = [pair for ours, plain in zip(got.scores, wanted, strict=True) for pair in zip(ours, plain, strict=True)]
        apart = max(abs(a - b) for a, b in pairs)
        scoring = timed(
            {
                "trimtab": lambda: choice_scores(base, tokenizer, asked),
                "forwards": lambda: one_by_one(base, tokenizer, asked),
            },
            max(3, flags.rounds // 3),
        )
    ratio = {name: round(decode[name][1] / decode["base"][1], 3) for name in ("merged", "unmerged", "peft")}
    print(
        json.dumps(
            {
                **vars(flags),
                "decode": decode,
                "over_base": ratio,
                "scoring": scoring,
                "scoring_ratio": round(scoring["forwards"][1] / scoring["trimtab"][1], 3),
                "largest_score_difference": apart,
            }
        )
    )


def stirred(adapter: Any) -> Any:
    """The adapter with B away from zero, as after training: a merge that changes nothing is refused."""
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(0.0, 0.01, generator=torch.Generator().manual_seed(0))
    return adapter


if __name__ == "__main__":
    main()
