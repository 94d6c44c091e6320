"""Commonsense questions in the files of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933).

A row's instruction ends in "Answer format: answer1/answer2/…", and its output is "the correct answer is answer2".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trimtab.data.layout import Row
from trimtab.data.read import read
from trimtab.errors import FormatError, UsageError
from trimtab.tasks.task import Item, WordedTask

ANSWERS = tuple(f"answer{n}" for n in range(1, 6))
WORDS: dict[str, tuple[str, ...]] = {
    "arc_easy": ANSWERS,
    "arc_challenge": ANSWERS,
    "openbookqa": ANSWERS,
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
}
"""The words that answer each task; a row may offer fewer of them."""
TEST_ALONE = ("piqa",)
SPLITS = ("train", "test")
RESPONSE = "the correct answer is "
OFFERED = re.compile(r"Answer format: (\S+)\s*$")
PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
"""Alpaca's prompt (Taori et al. 2023), which LLM-Adapters and the papers after it put around the instruction."""


@dataclass(frozen=True)
class Commonsense(WordedTask):
    """One of the tasks of WORDS, in commonsense/NAME.SPLIT.json.gz."""

    def file(self, split: str) -> str:
        splits = SPLITS[1:] if self.name in TEST_ALONE else SPLITS
        if split not in splits:
            raise UsageError(f"{self.name} has no split '{split}'; there is: {', '.join(splits)}")
        return f"commonsense/{self.name}.{split}.json.gz"

    def read(self, path: Path) -> tuple[Item, ...]:
        source = read(path, layout="alpaca")
        return tuple(self._item(row, path.name) for row in source.rows)

    def response(self, choice: str) -> str:
        return RESPONSE + choice

    def extract(self, text: str) -> str | None:
        """The first of the task's words in `text`, as written, as in LLM-Adapters' commonsense_evaluate.py.

        Its rule is kept whole, so that figures can be compared: case counts, a word inside another counts too, and
        where several are named the first is taken.
        """
        found = re.search("|".join(WORDS[self.name]), text)
        return found[0] if found else None

    def plain_prompt(self, question: str) -> str:
        return PLAIN.format(question)

    def _item(self, row: Row, file: str) -> Item:
        question, output = (turn.content for turn in row.turns)
        offered = OFFERED.search(question)
        choices = tuple(offered[1].split("/")) if offered else ()
        answer = output.removeprefix(RESPONSE)
        if not choices or not set(choices) <= set(WORDS[self.name]):
            raise FormatError(
                f"{file} row {row.number} must end in 'Answer format:' and some of {'/'.join(WORDS[self.name])}"
            )
        if output == answer or answer not in choices:
            raise FormatError(
                f"{file} row {row.number} must have the output '{RESPONSE}' and one of {', '.join(choices)}"
            )
        return Item(row.number - 1, question, choices, answer)
