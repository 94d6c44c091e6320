"""General-knowledge questions, to see what a model forgets while it learns something else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources


@dataclass(frozen=True)
class Question:
    """A question with its choices; `answer` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int
    topic: str


@lru_cache(maxsize=1)
def questions() -> tuple[Question, ...]:
    """The 80 questions that come with the package: four choices each, every position right equally often."""
    text = resources.files("trimtab.tasks").joinpath("knowledge.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return tuple(Question(row["question"], tuple(row["choices"]), row["answer"], row["topic"]) for row in rows)
