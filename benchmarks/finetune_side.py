"""One fine-tune by one side, as one JSON line: seconds, real tokens a second, memory, held-out loss.

usage: python benchmarks/finetune_side.py trimtab|peft --model DIR --data FILE [--eval-data FILE] [--examples 320]
    [--seed 0] [--threads 1] [--dtype float32] [--rank 16] [--batch 8] [--lr 2e-4] [--turns]

peft is PEFT with the transformers Trainer: loss on the response alone, dynamic padding, AdamW at a constant rate, no
clipping. trimtab trains the same examples in the same batches. Memory is the peak of resident memory above what it is
with the model loaded. A process of its own for each run, as memory is counted by process.

With --turns it says "done" after each step and waits for a line before the next, so that two sides can take turns on a
machine whose speed changes from minute to minute. Waiting is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def flags(given: list[str] | None = None) -> argparse.Namespace:
    """The flags of a run, by default those of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=("trimtab", "peft"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--eval-data", type=Path)
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--eval-examples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--turns", action="store_true")
    return parser.parse_args(given)


def about(asked: argparse.Namespace) -> dict[str, Any]:
    """What tells one run from another, as its line says it: the machine, and files by their names."""
    files = {"model": asked.model, "data": asked.data, "eval_data": asked.eval_data}
    return {**vars(asked), **{key: path and Path(path).name for key, path in files.items()}, "cpu": cpu()}


def cpu() -> str:
    """The processor's name, which several generations share, with its family and model; or what else is known of it."""
    told = Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", told.read_text(), re.M)) if told.exists() else {}
    if not fields.keys() >= {"model name", "cpu family", "model"}:
        return platform.processor() or platform.machine()
    return f"{fields['model name']}, family {fields['cpu family']} model {fields['model']}"


class Turns:
    """The seconds of each step; what is set up before the first one counts to it."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits
        self.seconds: list[float] = []
        self._since = 0.0

    def begin(self) -> None:
        """Training starts with the next turn."""
        self._wait()

    def step_done(self) -> None:
        """A step is over: the other side's turn."""
        self.seconds.append(time.perf_counter() - self._since)
        self._wait()

    def end(self) -> None:
        """What is done after the last step counts to it."""
        self.seconds[-1] += time.perf_counter() - self._since

    def _wait(self) -> None:
        if self.waits:
            print("done", flush=True)
            input()
        self._since = time.perf_counter()


def resident() -> int:
    """Bytes of resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def by_peft(model: Any, tokenizer: Any, examples: list[Any], asked: argparse.Namespace, turns: Turns) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.step_done()

    data = [
        {
            "input_ids": e.input_ids,
            "attention_mask": [1] * len(e.input_ids),
            "labels": [token if target else -100 for token, target in zip(e.input_ids, e.supervised, strict=True)],
        }
        for e in examples
    ]
    config = LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=asked.batch,
            num_train_epochs=1,
            learning_rate=asked.lr,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            seed=asked.seed,
            disable_tqdm=True,
            label_names=["labels"],
        )
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
        trainer = InOrder(
            model=adapted, args=arguments, train_dataset=data, data_collator=collator, callbacks=[Steps()]
        )
        turns.begin()
        trainer.train()
        turns.end()
        return adapted


def by_trimtab(model: Any, tokenizer: Any, examples: list[Any], asked: argparse.Namespace, turns: Turns) -> Any:
    import trimtab
    from trimtab.train.settings import Settings

    adapter = trimtab.attach(model, trimtab.LoRA(rank=asked.rank, alpha=2 * asked.rank), seed=asked.seed)
    settings = Settings(batch_size=asked.batch, lr=asked.lr, clip=0, seed=asked.seed, shuffle=False)
    turns.begin()
    trimtab.fit(adapter, examples, settings, on_step=lambda report: turns.step_done())
    turns.end()
    return model


def main() -> None:
    asked = flags()
    if asked.side == "trimtab":
        from trimtab.train.machine import spare_memory

        spare_memory()
    import torch
    from instructions import encoded, held_out_loss, shuffled
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(asked.seed)
    torch.set_num_threads(asked.threads)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    examples = shuffled(encoded(asked.data, tokenizer, 0, asked.examples), asked.seed)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype))
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # into memory: the file is mapped
    loaded = resident()
    train = by_trimtab if asked.side == "trimtab" else by_peft
    turns = Turns(asked.turns)
    adapted = train(model, tokenizer, examples, asked, turns)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loss = None
    if asked.eval_data:
        loss = held_out_loss(adapted, encoded(asked.eval_data, tokenizer, -asked.eval_examples, asked.eval_examples))
    tokens, seconds = sum(len(e.input_ids) for e in examples), sum(turns.seconds)
    print(
        json.dumps(
            {
                **about(asked),
                "real_tokens": tokens,
                "seconds": round(seconds, 2),
                "tokens_per_second": round(tokens / seconds, 2),
                "memory_bytes": peak - loaded,
                "loaded_bytes": loaded,
                "held_out_loss": loss,
                "step_seconds": [round(step, 3) for step in turns.seconds],
            }
        )
    )


if __name__ == "__main__":
    main()
