"""Results question by question, in a file that an evaluation goes on from when it was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import FormatError, UsageError
from trimtab.files import read_json, storage_error, whole_lines, write_whole

LINES, MADE_WITH = "examples.jsonl", "evaluation.json"


@dataclass(frozen=True)
class Outcome:
    """What came of one question.

    index: its place in the file, from 0. prompt: the hash of what the model was given. prediction: None where no answer
    could be read. scores: the log-probability of each choice's response in nats, of likelihood. text: what the model
    wrote, of generation.
    """

    index: int
    prompt: str
    prediction: str | None
    answer: str
    correct: bool
    scores: dict[str, float] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Setup:
    """What results depend on. Names are for people; digests, of weights and of files, tell apart.

    max_new_tokens is None where nothing is generated. data: the digest of each task's file.
    """

    model: str
    model_digest: str
    dtype: str
    adapter: str | None
    adapter_digest: str | None
    scoring: str
    max_new_tokens: int | None
    data: dict[str, str]


class Results:
    """A folder with one line of `examples.jsonl` for each question, and what they were made with in evaluation.json."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        """Open a folder, new or with results that go on. UsageError, naming what differs, for other results."""
        self._path = folder / LINES
        beside = folder / MADE_WITH
        if self._path.exists() and not beside.exists():
            raise UsageError(f"{self._path} is there without {MADE_WITH}, so it cannot be told what made it: {_OTHER}")
        data = setup.data
        if beside.exists():
            before = read_json(beside)
            _refuse_other(before, setup, beside)
            data = before["data"] | data
        write_whole(beside, json.dumps({**asdict(setup), "data": data}, indent=2, ensure_ascii=False) + "\n")
        self._lines = list(whole_lines(self._path))

    def done(self, task: str, prompts: Mapping[int, str]) -> dict[int, Outcome]:
        """What is there already, by index, of the questions whose prompts have these hashes. UsageError for others."""
        found: dict[int, Outcome] = {}
        for number, line in self._lines:
            try:
                fields = dict(line)
                mine = fields.pop("task") == task
                outcome = Outcome(**fields)
            except (TypeError, KeyError, ValueError) as error:
                raise FormatError(f"{self._path} line {number} is no result of trimtab eval: {_OTHER}") from error
            if not mine or outcome.index not in prompts:
                continue
            if outcome.prompt != prompts[outcome.index]:
                raise UsageError(
                    f"{self._path} line {number} answers another prompt than question {outcome.index} of {task} is now "
                    f"(another chat template?): {_OTHER}"
                )
            found.setdefault(outcome.index, outcome)
        return found

    def add(self, task: str, outcomes: Sequence[Outcome]) -> None:
        """Append the lines of a batch, all at once. Raises StorageError."""
        lines = "".join(json.dumps(_line(task, outcome), ensure_ascii=False) + "\n" for outcome in outcomes)
        try:
            with self._path.open("ab") as file:
                file.write(lines.encode())
        except OSError as error:
            raise storage_error(error, self._path) from error


_OTHER = "choose another folder, or empty this one"


def _line(task: str, outcome: Outcome) -> dict[str, Any]:
    fields = asdict(outcome)
    unused = "text" if outcome.text is None else "scores"
    return {"task": task, **{key: value for key, value in fields.items() if key != unused}}


def _refuse_other(before: Mapping[str, Any], setup: Setup, file: Path) -> None:
    """UsageError unless what was made before and what is to be made now go together."""
    now = asdict(setup)
    if before.keys() != now.keys() or not isinstance(before["data"], dict):
        raise FormatError(f"{file} is not what trimtab eval writes: {_OTHER}")
    for kind in ("model", "adapter"):
        if before[f"{kind}_digest"] != now[f"{kind}_digest"] and before["dtype"] == now["dtype"]:
            raise UsageError(f"{file.parent} holds results of {_two(kind, before[kind], now[kind])}: {_OTHER}")
    for key in ("dtype", "scoring", "max_new_tokens"):
        if before[key] != now[key]:
            raise UsageError(
                f"{file.parent} holds results with {key} {before[key]}, but now it is {now[key]}: {_OTHER}"
            )
    for task in before["data"].keys() & now["data"].keys():
        if before["data"][task] != now["data"][task]:
            raise UsageError(f"{file.parent} holds results of {task} from another data file than this one: {_OTHER}")


def _two(kind: str, before: str | None, now: str | None) -> str:
    if before == now:
        return f"{kind} {now} as it was, but its weights are others now"
    return f"{f'{kind} {before}' if before else f'no {kind}'}, but now it is {now or 'none'}"
