"""Does pretraining lower the intrinsic dimension of what is learned next? A small transformer, pretrained here.

usage: python benchmarks/pretraining.py --out DIR [--threads 2] [flags of trimtab measure dimension ...]

A Llama of 1.3 million parameters learns to write the source of this Python's standard library, and is saved as it
starts and after 50, 150, 500, 1,500 and 3,000 steps. The task that is learned from each of these is to tell which of
six packages a function is from; its test functions are from modules that neither training has seen. Then the series is
measured by `trimtab measure dimension --checkpoints`, which prints what it comes to. Everything that was done stands in
--out and is not done again: a pretraining that was stopped goes on at the last checkpoint. `--rows`, `--lr` and all
other flags of that command are passed on.
"""

from __future__ import annotations

import argparse
import os
import random
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.cli import run
from trimtab.tasks import naming

STEPS = (0, 50, 150, 500, 1500, 3000)
VOCABULARY, CONTEXT, BATCH, LR, WARM_UP = 4096, 128, 32, 1e-3, 100
PACKAGES = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "xml")
EACH = {"train": 200, "test": 60}
"""Functions of each package."""
END = "<|end|>"
MEASURED = ("--epochs", "5", "--lr", "1e-3", "--batch-size", "32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    asked, passed_on = parser.parse_known_args()
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    seen = functions_of_packages(asked.out)
    checkpoints = asked.out / "checkpoints"
    if not folder(checkpoints, STEPS[-1]).exists():
        pretrain(checkpoints, seen)
    files = ["--task", str(asked.out / "train.tsv"), "--test-data", str(asked.out / "test.tsv")]
    series = ["--checkpoints", str(checkpoints), *files, "--out", str(asked.out / "dimension")]
    run(["measure", "dimension", *series, *MEASURED, *passed_on])


def functions_of_packages(out: Path) -> list[Path]:
    """Write train.tsv and test.tsv; returns the modules' files without those of the test side."""
    root = Path(sysconfig.get_paths()["stdlib"])
    task = naming.build(train=4500, test=1200)
    for split, functions in (("train", task.train), ("test", task.test)):
        rows = []
        for package in PACKAGES:
            own = [f for f in functions if f.module.partition(".")[0] == package][: EACH[split]]
            rows += [f"{' '.join(f.code.split())}\t{package}" for f in own]
        random.Random(0).shuffle(rows)
        (out / f"{split}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    apart = {root.joinpath(*module.split(".")) for module in task.modules_test}
    skipped = {*naming.SKIPPED_FOLDERS}
    files = (path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts))
    return [path for path in files if path.with_suffix("") not in apart and path.parent not in apart]


def pretrain(checkpoints: Path, files: Sequence[Path]) -> None:
    """Save the model at each of STEPS, from the last one that is there on."""
    tokenizer = tokenizer_of(checkpoints.parent / "tokenizer.json", files)
    text = [path.read_text(errors="replace") + END for path in files]
    tokens = torch.tensor([token for ids in tokenizer(text)["input_ids"] for token in ids])
    start = max((step for step in STEPS if (folder(checkpoints, step) / "state.pt").exists()), default=None)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    if start is None:
        save(checkpoints, 0, model, tokenizer, optimizer)
    else:
        state = torch.load(folder(checkpoints, start) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    begun = time.perf_counter()
    for step in range((start or 0) + 1, STEPS[-1] + 1):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, step / WARM_UP)
        places = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
        rows = torch.stack([tokens[place : place + CONTEXT] for place in places.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in STEPS:
            save(checkpoints, step, model, tokenizer, optimizer)
            seconds = time.perf_counter() - begun
            print(f"step {step} of {STEPS[-1]}: loss {loss.item():.3f}, {seconds:.0f} s of {len(tokens):,} tokens")


def tokenizer_of(path: Path, files: Sequence[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCABULARY tokens, learned on the files once."""
    if not path.exists():
        learned = ByteLevelBPETokenizer()
        learned.train([str(file) for file in files], vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
        learned.save(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=END, pad_token=END, model_max_length=CONTEXT, padding_side="right"
    )


def folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step}"


def save(checkpoints: Path, step: int, model: Any, tokenizer: Any, optimizer: Any) -> None:
    """A folder that appears whole, with what it takes to go on from it."""
    whole = folder(checkpoints, step)
    part = whole.with_name(f".{whole.name}")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, part / "state.pt")
    part.rename(whole)


if __name__ == "__main__":
    main()
