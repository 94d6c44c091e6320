"""Does pretraining lower the intrinsic dimension of what is learned next? A small transformer, pretrained here.

usage: python benchmarks/pretraining.py --out DIR [--threads 2] [flags of trimtab measure dimension ...]

A Llama of 1.3 million parameters learns to write the source of this Python's standard library, and is saved as it
starts and after 50, 150, 500, 1,500 and 3,000 steps. The task that is learned from each of these is to tell which of
four packages a function is from, its code put on one line. Functions are tested on whose modules neither training has
seen; the functions that the task is trained on are part of the pretraining's text.

The series is measured by `trimtab measure dimension --checkpoints` twice: with a threshold of 0.9 of each checkpoint's
own baseline, and with one for all, 0.9 of the lowest baseline, which takes the runs of the first. The learning rate is
the best of three multiples by the validation split: of all parameters, and in subspaces at the first d where
anything is learned, whose multiple of lr √(D/d) every later d is given. There is one pretraining, from one start:
seeds draw heads, projections and the order of the data. Everything that was done stands in --out and is not done again;
a pretraining that was stopped goes on at the last checkpoint. All other flags of the command are passed on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.cli import run
from trimtab.files import read_json, whole_folder, whole_lines, write_whole
from trimtab.tasks import naming
from trimtab.tasks.digests import text_digest

STEPS = (0, 50, 150, 500, 1500, 3000)
VOCABULARY, CONTEXT, BATCH, LR, WARM_UP = 4096, 128, 32, 1e-3, 100
PACKAGES = ("asyncio", "idlelib", "tkinter", "xml")
EACH = {"train": 170, "test": 85}
"""Functions of each package."""
END = "<|end|>"
RATES = ("--lr", "1e-3", "--rates", "0.5,1,2", "--rates-at", "first")
MEASURED = ("--epochs", "10", *RATES, "--resolution", "1.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    asked, passed_on = parser.parse_known_args()
    torch.set_num_threads(asked.threads)
    out: Path = asked.out
    seen, withheld = functions_of_packages(out)
    settle(out, [*seen, *withheld])
    if not folder(out, STEPS[-1]).exists():
        Pretraining(out, seen, withheld).run()
    files = ["--task", str(out / "train.tsv"), "--test-data", str(out / "test.tsv")]
    series = ["measure", "dimension", "--checkpoints", str(out / "checkpoints"), *files, *MEASURED, *passed_on]
    stop_unless_done(run([*series, "--out", str(out / "own")]))
    found = [read_json(path)["baseline"] for path in (out / "own").glob("*/results.json")]
    lowest = min(sum(scores) / len(scores) for scores in found)
    common = ["--threshold", "absolute", "--share", f"{0.9 * lowest:.4f}", "--reuse", str(out / "own")]
    stop_unless_done(run([*series, *common, "--out", str(out / "common")]))


def stop_unless_done(code: int) -> None:
    """End with the code of a command that failed or was interrupted."""
    if code:
        sys.exit(code)


def functions_of_packages(out: Path) -> tuple[list[Path], list[Path]]:
    """Write train.tsv and test.tsv; returns the files to pretrain on, and those of the test side's modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    task = naming.build(train=4500, test=1200)
    for split, functions in (("train", task.train), ("test", task.test)):
        rows = []
        for package in PACKAGES:
            own = [f for f in functions if f.module.partition(".")[0] == package][: EACH[split]]
            if len(own) < EACH[split]:
                sys.exit(f"{package} has {len(own)} functions to {split} on here, but {EACH[split]} are needed")
            rows += [f"{' '.join(f.code.split())}\t{package}" for f in own]
        random.Random(0).shuffle(rows)
        write_whole(out / f"{split}.tsv", "sentence\tlabel\n" + "\n".join(rows) + "\n")
    modules = {root.joinpath(*module.split(".")) for module in task.modules_test}
    apart = {module.with_suffix(".py") for module in modules} | {module / "__init__.py" for module in modules}
    skipped = {*naming.SKIPPED_FOLDERS}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    return [path for path in files if path not in apart], [path for path in files if path in apart]


def settle(out: Path, files: Sequence[Path]) -> None:
    """Write down what is pretrained, and on what; end where the folder holds another pretraining."""
    constants = [STEPS, VOCABULARY, CONTEXT, BATCH, LR, WARM_UP]
    digest = text_digest(repr(constants) + "".join(path.read_text(errors="replace") for path in files))
    path = out / "settings.json"
    if path.exists() and read_json(path)["digest"] != digest:
        sys.exit(f"{out} holds a pretraining on other files or with other settings: choose another folder")
    write_whole(path, json.dumps({"digest": digest, "files": len(files)}) + "\n")


class Pretraining:
    """One pretraining on the text of some files, watched by the loss on others."""

    def __init__(self, out: Path, seen: Sequence[Path], withheld: Sequence[Path]) -> None:
        self.out = out
        self.tokenizer = tokenizer_of(out / "tokenizer.json", seen)
        self.tokens, others = self._tokens(seen), self._tokens(withheld)
        rows = others[: len(others) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        self.withheld = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:256]]
        torch.manual_seed(0)
        self.model: Any = fresh_model(self.tokenizer)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.01)

    def _tokens(self, files: Sequence[Path]) -> Tensor:
        text = [path.read_text(errors="replace") + END for path in files]
        return torch.tensor([token for ids in self.tokenizer(text)["input_ids"] for token in ids])

    def run(self) -> None:
        """Save the model at each of STEPS, from the last one that is there on."""
        start = max((step for step in STEPS if folder(self.out, step).exists()), default=None)
        if start is None:
            self.save(0)
        else:
            state = torch.load(folder(self.out, start) / "state.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        for step in range((start or 0) + 1, STEPS[-1] + 1):
            self.step(step)
            if step in STEPS:
                self.save(step)

    def step(self, step: int) -> None:
        """One step; which rows it reads depends on its number alone."""
        for group in self.optimizer.param_groups:
            group["lr"] = LR * min(1.0, step / WARM_UP)
        places = torch.randint(len(self.tokens) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
        rows = torch.stack([self.tokens[place : place + CONTEXT] for place in places.tolist()])
        self.model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int) -> None:
        """The checkpoint, with what it takes to go on from it, and a line of losses.jsonl."""
        with whole_folder(folder(self.out, step)) as part:
            self.model.save_pretrained(part)
            self.tokenizer.save_pretrained(part)
            torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, part / "state.pt")
        with torch.no_grad():
            loss = self.model(input_ids=self.withheld, labels=self.withheld).loss.item()
        path = self.out / "losses.jsonl"
        kept = [json.dumps(line) for _, line in whole_lines(path) if line["step"] < step]
        line = {"step": step, "tokens": step * BATCH * CONTEXT, "corpus": len(self.tokens), "withheld_loss": loss}
        write_whole(path, "\n".join([*kept, json.dumps(line)]) + "\n")
        print(f"step {step} of {STEPS[-1]}: loss {loss:.3f} nats a token on modules withheld", flush=True)


def fresh_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """1.3 million parameters, drawn at random."""
    config = LlamaConfig(
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
    return LlamaForCausalLM(config)


def tokenizer_of(path: Path, files: Sequence[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCABULARY tokens, learned on the files once."""
    if not path.exists():
        learned = ByteLevelBPETokenizer()
        learned.train([str(file) for file in files], vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
        write_whole(path, learned.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=END, pad_token=END, model_max_length=CONTEXT, padding_side="right"
    )


def folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step}"


if __name__ == "__main__":
    main()
