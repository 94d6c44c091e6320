"""What a task of `trimtab eval` is: questions, how an answer is worded, and how one is read. Imports no torch."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trimtab.data.layout import Row, Turn
from trimtab.errors import UsageError

T = TypeVar("T", bound="Item")

VARIABLE = "TRIMTAB_DATA"
"""The environment variable that names the folder of data, where the user names none."""


@dataclass(frozen=True)
class Item:
    """One question of a task.

    index: its place in the file, counted from 0. question: what the user says. choices: the answers there are to
    choose among. answer: the right one of them.
    """

    index: int
    question: str
    choices: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Task(ABC):
    """A set of questions by its name in `TASKS`."""

    name: str

    @abstractmethod
    def file(self, split: str) -> str:
        """Where the rows of a split (train, test) are in the folder of data. UsageError for a split there is not."""

    @abstractmethod
    def read(self, path: Path) -> tuple[Item, ...]:
        """The questions in a file. UsageError, naming the row, for what is no question of this task."""

    def items(self, split: str = "test", data: str | Path | None = None) -> tuple[Item, ...]:
        """The questions of a split. data: the folder, by default the one that TRIMTAB_DATA names.

        Raises UsageError where there is no such folder or file, saying what was looked for.
        """
        return self.read(self.path(split, data))

    def path(self, split: str = "test", data: str | Path | None = None, *, flag: str = "--data") -> Path:
        """The file of a split; see `items`. flag: by which the user gave data, for errors."""
        file, named = self.file(split), data or os.environ.get(VARIABLE)
        if not named:
            raise UsageError(f"{self.name} needs a folder with {file} in it: name it with {flag} or in {VARIABLE}")
        by = flag if data else VARIABLE
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise UsageError(f"{by} names {folder}, which is no folder; {file} is looked for in it")
        if not (folder / file).is_file():
            raise UsageError(f"{by} names {folder}, which has no {file}; give the folder that has")
        return folder / file


@dataclass(frozen=True)
class WordedTask(Task):
    """Questions that are answered in words; a family of such tasks is one subclass."""

    @abstractmethod
    def response(self, choice: str) -> str:
        """How an answer is worded."""

    @abstractmethod
    def extract(self, text: str) -> str | None:
        """The answer that a generated text gives; None where it gives none."""

    @abstractmethod
    def plain_prompt(self, question: str) -> str:
        """A question as text, for models without a chat template."""

    def row(self, item: Item, choice: str, *, chat: bool) -> Row:
        """A question with an answer as a row of training data.

        chat: for a model with a chat template, which is put around the question; else the question is written out.
        """
        question = item.question if chat else self.plain_prompt(item.question)
        turns = Turn("user", question), Turn("assistant", self.response(choice))
        return Row(turns, None, item.index + 1, raw=not chat)


def training_rows(task: WordedTask, items: Sequence[Item], *, chat: bool = True) -> tuple[Row, ...]:
    """The questions with their right answers, as `data.encode` takes them. chat: see `WordedTask.row`."""
    return tuple(task.row(item, item.answer, chat=chat) for item in items)


def subset(items: Sequence[T], limit: int | None, seed: int) -> tuple[T, ...]:
    """`limit` of the questions drawn at random, in the order of the file; all where there are no more, or no limit.

    With one seed the smaller subsets are part of the larger ones. UsageError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}, but must be at least 1 question")
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return tuple(items[i] for i in sorted(order[:limit]))
