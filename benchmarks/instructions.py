"""What both sides of a benchmark train on: the same token sequences, in the same batches.

The files are JSON lists of {"instruction", "input", "output"}, gzipped or not. A row is the model's chat template
around the instruction, then the output, the end-of-sequence token and a line feed; the loss is on what follows the
template.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import torch

from trimtab.data.encode import Example


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found: list[dict[str, str]] = json.loads(content)
    return found


def encoded(path: Path, tokenizer: Any, start: int, count: int, max_length: int = 512) -> list[Example]:
    """The rows start .. start + count of a file as tokens; a negative start counts from the end."""
    found = rows(path)
    start = start % len(found)
    examples = []
    for number, row in enumerate(found[start : start + count], start=start + 1):
        turn = [{"role": "user", "content": (row["instruction"] + "\n" + row.get("input", "")).strip()}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        whole = prompt + row["output"].strip() + tokenizer.eos_token + "\n"
        before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
        kept = ids[:max_length]
        supervised = [i >= len(before) for i in range(len(kept))]
        examples.append(Example(kept, supervised, number, len(ids) - len(kept), False))
    return examples


def shuffled(examples: list[Example], seed: int) -> list[Example]:
    """The examples in the order that both sides take them in, batch after batch."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    return order


@torch.no_grad()
def held_out_loss(model: Any, examples: list[Example]) -> float:
    """Nats per supervised token, one example at a time, through the model's own forward."""
    model.eval()
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        predicted = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        chosen = torch.tensor(example.supervised[1:])
        total -= predicted[chosen].gather(1, ids[0, 1:][chosen, None]).sum().item()
        count += int(chosen.sum())
    return total / count
