"""Does LoRA-Dash pay? LoRA and Dash of rank 2 and 16, and Dash with directions that no change rate chose.

usage: python benchmarks/dash_study.py --model DIR --data DIR [--threads 2] [--seeds 0 1 2] [--arms "LoRA r=2" ...]
    [--wording text] [--out benchmarks/results/dash_study.jsonl]

Commonsense questions of four training sets mixed, the loss on the response alone. First each arm's learning rate: every
arm is trained once at each of RATES, and the rate with the lowest loss on held-out training questions is taken. Then
every arm is trained at its rate with each seed, and asked the test questions by likelihood. A run is one line of the
file, and a run that stands there is not run again. `dash_study_report.py` says what the lines come to. An arm's runs
need no other arm's, so that two processes can share the arms, each with a file of its own.

--wording text: "Question: …\\nAnswer:", continued by the text of a choice. --wording numbers: the instruction of
LLM-Adapters with all choices in it, answered "the correct answer is answer2", on which a model this small stays at
chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab
from trimtab.data.encode import encode
from trimtab.data.layout import Row, Turn
from trimtab.deltas import make_method
from trimtab.files import whole_lines
from trimtab.tasks import make_task
from trimtab.tasks.evaluate import evaluate
from trimtab.tasks.knowledge import Question
from trimtab.tasks.likelihood import choice_scores, prompt_of
from trimtab.tasks.task import Item, subset, training_rows
from trimtab.train.machine import spare_memory
from trimtab.train.settings import Settings

TASKS = ("arc_easy", "arc_challenge", "openbookqa", "boolq")
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
BARE = "no adapter"
TUNING_SEED = 100  # no other run has it
HELD_OUT_SEED = 1000
WHOLE = re.compile(
    r"Please (?:choose the correct answer to the question:|answer the following question with true or false, question:)"
    r"(?P<question>.*?)(?:\n\n(?P<choices>Answer1:.*))?\n\nAnswer format:.*",
    re.DOTALL,
)
NUMBERED = re.compile(r"(?:^|\s)Answer\d: ")
ARMS: dict[str, dict[str, Any]] = {
    "LoRA r=2": {"method": "lora", "rank": 2},
    "LoRA r=16": {"method": "lora", "rank": 16},
    "Dash r=2": {"method": "dash", "rank": 2},
    "Dash r=16": {"method": "dash", "rank": 16},
    "Dash r=2, random": {"method": "dash", "rank": 2, "pick": "random"},
    "Dash r=2, smallest σ": {"method": "dash", "rank": 2, "pick": "smallest"},
    "Dash r=2, d at 10 × the rate": {"method": "dash", "rank": 2, "direction_lr": 10.0},
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything: questions of each task, and the warm-up's share of the steps. wording: of a question."""

    train: int = 180
    held_out: int = 60
    test: int = 150
    batch: int = 8
    warm_up: float = 0.2
    wording: str = "text"


class Study:
    """The model, the data and the file of results."""

    def __init__(self, model: str, data: Path, out: Path, sizes: Sizes) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        if sizes.wording == "text":
            self.tokenizer.chat_template = None  # questions stand as written
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.data, self.out, self.sizes = data, out, sizes
        self.about = {"model": Path(model).name, "threads": torch.get_num_threads(), **dataclasses.asdict(sizes)}

    def questions(self, split: str, count: int, seed: int) -> list[tuple[Any, tuple[Any, ...]]]:
        """(task, its questions) of every task, drawn with a seed."""
        tasks = [make_task(name) for name in TASKS]
        return [(task, subset(task.items(split, self.data), count, seed)) for task in tasks]

    def examples(self, seed: int, held_out: bool = False) -> list[Any]:
        """The training questions of a seed, or the held-out ones, as tokens in an order of the seed's own."""
        rows: list[Any] = []
        for task, apart in self.questions("train", self.sizes.held_out, HELD_OUT_SEED):
            left = [item for item in task.items("train", self.data) if item not in set(apart)]
            drawn = apart if held_out else subset(left, self.sizes.train, seed)
            rows += text_rows(drawn) if self.sizes.wording == "text" else training_rows(task, drawn)
        random.Random(seed).shuffle(rows)
        return encode(rows, self.tokenizer, max_length=1024)

    def run(self, arm: str, lr: float, seed: int) -> None:
        """One run, added to the file unless it is there: of the tuning seed with its held-out loss, else tested."""
        known = {"arm": arm, "lr": lr, "seed": seed, **self.about}
        if stored(self.out, known):
            return
        tuning, examples = seed == TUNING_SEED, self.examples(seed)
        held_out = self.examples(HELD_OUT_SEED, held_out=True) if tuning else []
        steps = -(-len(examples) // self.sizes.batch)
        options = dict(ARMS[arm])
        if options["method"] == "dash":
            options["warm_up_steps"] = round(self.sizes.warm_up * steps)
        method = make_method(options.pop("method"), alpha=2.0 * options["rank"], **options)
        adapter = trimtab.attach(self.model, method, seed=seed)
        start = time.perf_counter()
        settings = Settings(lr=lr, batch_size=self.sizes.batch, schedule="linear", seed=seed)
        pad = self.tokenizer.pad_token_id or 0
        done = trimtab.fit(adapter, examples, settings, eval_examples=held_out, pad_id=pad)
        line = {
            **known,
            "parameters": sum(p.numel() for p in adapter.parameters()),
            "steps": done.steps,
            "train_loss": round(done.train_loss, 5),
            "seconds": round(time.perf_counter() - start, 1),
            **({"held_out_loss": done.eval_loss} if tuning else self.tested()),
        }
        adapter.remove()
        self._add(line)

    def bare(self) -> None:
        """The model as it is, tested; one line of the file."""
        known = {"arm": BARE, **self.about}
        if not stored(self.out, known):
            self._add({**known, "parameters": 0, "chance": self.chance(), **self.tested()})

    def chance(self) -> dict[str, float]:
        """The share of the test questions that guessing answers rightly, by task."""
        asked = {task.name: items for task, items in self.questions("test", self.sizes.test, 0)}
        return {
            name: sum(1 / len(as_text(item).choices) for item in items) / len(items) for name, items in asked.items()
        }

    def _add(self, line: dict[str, Any]) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a line that was cut off
        with self.out.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print({k: v for k, v in line.items() if k not in ("answers", "nats", "chance", *self.about)}, flush=True)

    def tested(self) -> dict[str, dict[str, list[float]]]:
        """Of the test questions by task: which are answered rightly (1, 0), and the nats a byte of the right answer."""
        answers: dict[str, list[float]] = {}
        nats: dict[str, list[float]] = {}
        for task, items in self.questions("test", self.sizes.test, 0):
            if self.sizes.wording == "text":
                asked = [as_text(item) for item in items]
                found = choice_scores(self.model, self.tokenizer, asked)
                answers[task.name] = [int(correct) for correct in found.correct]
                pairs = zip(found.scores, asked, strict=True)
                nats[task.name] = [round(-scores[question.answer], 5) for scores, question in pairs]
            else:
                outcomes = evaluate(self.model, self.tokenizer, task, items)
                answers[task.name] = [int(outcome.correct) for outcome in outcomes]
        return {"answers": answers, "nats": nats}


def as_text(item: Item) -> Question:
    """A question with the texts of its choices."""
    asked = WHOLE.fullmatch(item.question)
    assert asked is not None, item.question
    choices = tuple(text.strip() for text in NUMBERED.split(asked["choices"] or "")[1:]) or item.choices
    return Question(asked["question"].strip(), choices, item.choices.index(item.answer), "")


def text_rows(items: Sequence[Item]) -> list[Row]:
    """Questions with the text of their right answers, as `data.encode` takes them."""
    rows = []
    for item in items:
        question = as_text(item)
        turns = Turn("user", prompt_of(question)), Turn("assistant", f" {question.choices[question.answer]}")
        rows.append(Row(turns, None, item.index + 1, raw=True))
    return rows


def stored(path: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs there are of a model and sizes; a last line that was cut off is none."""
    lines = whole_lines(path, repair=False)  # another process may be writing it
    return [line for _, line in lines if about.items() <= line.items()]


def chosen_rate(runs: Sequence[dict[str, Any]], arm: str) -> float:
    """The rate with the lowest held-out loss of an arm's tuning runs, once all have been made."""
    losses = {run["lr"]: run["held_out_loss"] for run in runs if run["arm"] == arm and run.get("seed") == TUNING_SEED}
    return min(RATES, key=lambda rate: float(losses[rate]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, BARE), default=[*ARMS, BARE])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dash_study.jsonl")
    for field in dataclasses.fields(Sizes):
        kinds = ("text", "numbers") if field.name == "wording" else None
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default, choices=kinds)
    asked = vars(parser.parse_args())
    spare_memory()
    torch.set_num_threads(asked["threads"])
    sizes = Sizes(**{field.name: asked[field.name] for field in dataclasses.fields(Sizes)})
    arms = [arm for arm in ARMS if arm in asked["arms"]]
    study = Study(asked["model"], asked["data"], asked["out"], sizes)
    for lr in RATES:
        for arm in arms:
            study.run(arm, lr, TUNING_SEED)
    if BARE in asked["arms"]:
        study.bare()
    for seed in asked["seeds"]:
        for arm in arms:
            study.run(arm, chosen_rate(stored(asked["out"], study.about), arm), seed)


if __name__ == "__main__":
    main()
