"""What a row of training text is, and how the records of a file become rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.errors import UsageError, did_you_mean, problems_to_error

Role = Literal["system", "user", "assistant"]
Record = tuple[int, Mapping[str, Any]]

KNOWN = {
    "alpaca": "instruction, input (optional), output",
    "messages": "messages: a list of role and content",
    "sharegpt": "conversations: a list of from and value",
    "prompt-completion": "prompt and completion, prompt and response, or question and answer",
    "text": "text, or a .txt file with one row a line",
}
LISTS = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
ROLES: Mapping[str, Mapping[str, Role]] = {
    "messages": {"system": "system", "user": "user", "assistant": "assistant"},
    "sharegpt": {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
    },
}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Row:
    """One training row: a conversation in `turns`, or plain text in `text` and no turns.

    number: the row's place in its file, counted from 1 (the line, in files of one row a line).
    raw: prompt and completion may stand as written where the tokenizer has no chat template.
    """

    turns: tuple[Turn, ...]
    text: str | None
    number: int
    raw: bool = False


@dataclass(frozen=True)
class Layout:
    """Which layout a file has, and the keys it is read from."""

    name: str
    keys: tuple[str, ...]


class RowError(ValueError):
    """What is wrong with one row."""


class MissingAnswer(RowError):
    """A row without an answer. `row` is the row with a blank one in its place."""

    def __init__(self, message: str, row: Row) -> None:
        super().__init__(message)
        self.row = row


def detect(records: Sequence[Record], wanted: str, what: str) -> Layout:
    """The layout of `records`, from their keys; UsageError when none fits, or more than one does.

    wanted: "auto", or the one layout to accept. what: the file's name in messages.
    """
    check_layout_name(wanted)
    keys = list(dict.fromkeys(key for _, record in records for key in record))
    found = _candidates(keys, records)
    if wanted != "auto":
        found = [layout for layout in found if layout.name == wanted]
    elif len(found) > 1:
        # Instruction files often carry the whole rendered prompt as "text" beside the parts it was made of.
        found = [layout for layout in found if layout.name != "text"]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(key if len(key) <= 40 else key[:40] + "…" for key in keys[:12]) or "none"
    if found:
        fits = " and ".join(f"{layout.name} ({', '.join(layout.keys)})" for layout in found)
        raise UsageError(f"{what}: the keys ({shown}) fit {fits}; say which with the layout option, or drop some keys")
    known = "; ".join(f"{name} ({KNOWN[name]})" for name in ([wanted] if wanted != "auto" else KNOWN))
    raise UsageError(f"{what}: no known layout in its keys ({shown}); expected {known}; rename the keys")


def check_layout_name(wanted: str) -> None:
    """UsageError unless `wanted` is "auto" or a known layout."""
    if wanted != "auto" and wanted not in KNOWN:
        names = ("auto", *KNOWN)
        raise UsageError(f"unknown layout '{wanted}'{did_you_mean(wanted, names)}; known: {', '.join(names)}")


def _candidates(keys: Sequence[str], records: Sequence[Record]) -> list[Layout]:
    found = []
    if "instruction" in keys and "output" in keys:
        found.append(Layout("alpaca", tuple(k for k in ("instruction", "input", "output") if k in keys)))
    for key in LISTS:
        if key in keys:
            found.append(Layout(_style_of_turns(key, records), (key,)))
    found += [Layout("prompt-completion", pair) for pair in PAIRS if pair[0] in keys and pair[1] in keys]
    if "text" in keys:
        found.append(Layout("text", ("text",)))
    return found


def _style_of_turns(key: str, records: Iterable[Record]) -> str:
    for _, record in records:
        turns = record.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return "sharegpt" if "from" in turns[0] else "messages"
    return "messages" if key == "messages" else "sharegpt"


def to_rows(
    records: Iterable[Record], layout: Layout, what: str, *, keep_incomplete: bool = False
) -> tuple[tuple[Row, ...], tuple[int, ...]]:
    """The rows of `records`, and the numbers of those without an answer.

    UsageError lists the wrong rows. A row without an answer is one of them, unless keep_incomplete: then it
    stays, with a blank answer or none, and its number is returned.
    """
    build = _BUILDERS[layout.name]
    rows: list[Row] = []
    incomplete: list[int] = []
    problems: list[str] = []
    for number, record in records:
        try:
            rows.append(build(record, layout, number))
        except MissingAnswer as error:
            incomplete.append(number)
            rows.append(error.row)
            if not keep_incomplete:
                problems.append(f"row {number} {error}; give it one or remove the row")
        except RowError as error:
            problems.append(f"row {number} {error}")
    if len(problems) > 5:
        problems[5:] = [f"and {len(problems) - 5:,} more rows like these"]
    problems_to_error(problems, what)
    return tuple(rows), tuple(incomplete)


def _text(record: Mapping[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowError(f"has a {type(value).__name__} as '{key}', but must have text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"has half a surrogate pair in '{key}' (character {error.start + 1}): not valid text") from error
    return value


def _pair(prompt: str | None, answer: str | None, layout: Layout, number: int, *, raw: bool) -> Row:
    if prompt is None or not prompt.strip():
        raise RowError(f"has no prompt: '{layout.keys[0]}' is {'missing' if prompt is None else 'blank'}")
    row = Row((Turn("user", prompt), Turn("assistant", answer or "")), None, number, raw)
    if answer is None or not answer.strip():
        problem = "missing" if answer is None else "blank"
        raise MissingAnswer(f"has no answer: '{layout.keys[-1]}' is {problem}", row)
    return row


def _alpaca(record: Mapping[str, Any], layout: Layout, number: int) -> Row:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    prompt = None if instruction is None else (instruction + "\n" + (_text(record, "input") or "")).strip()
    return _pair(prompt, None if output is None else output.strip(), layout, number, raw=False)


def _prompt_completion(record: Mapping[str, Any], layout: Layout, number: int) -> Row:
    prompt, answer = (_text(record, key) for key in layout.keys)
    return _pair(prompt, answer, layout, number, raw=True)


def _plain(record: Mapping[str, Any], layout: Layout, number: int) -> Row:
    text = _text(record, "text")
    if text is None or not text.strip():
        raise MissingAnswer(f"has no text: 'text' is {'missing' if text is None else 'blank'}", Row((), "", number))
    return Row((), text, number)


def _conversation(record: Mapping[str, Any], layout: Layout, number: int) -> Row:
    key = layout.keys[0]
    items = record.get(key)
    if not isinstance(items, list) or not items:
        raise RowError(f"has no turns: '{key}' is {'empty' if items == [] else 'not a list of turns'}")
    turns = tuple(_turn(item, place, layout.name) for place, item in enumerate(items, start=1))
    row = Row(turns, None, number)
    blank = [
        place for place, turn in enumerate(turns, start=1) if turn.role == "assistant" and not turn.content.strip()
    ]
    if blank:
        raise MissingAnswer(f"has no answer: turn {blank[0]}, the assistant's, is blank", row)
    if turns[-1].role != "assistant":
        raise MissingAnswer(f"has no answer: its last turn is the {turns[-1].role}'s, not the assistant's", row)
    return row


def _turn(item: Any, place: int, layout: str) -> Turn:
    role_key, text_key = ("role", "content") if layout == "messages" else ("from", "value")
    roles = ROLES[layout]
    if not isinstance(item, Mapping) or role_key not in item:
        raise RowError(f"has a turn {place} that is not a mapping with '{role_key}' and '{text_key}'")
    role = item[role_key]
    if not isinstance(role, str) or role not in roles:
        raise RowError(f"has an unknown role {role!r} in turn {place}; known: {', '.join(roles)}")
    content = _text(item, text_key)
    if content is None:
        raise RowError(f"has no '{text_key}' in turn {place}")
    return Turn(roles[role], content)


_BUILDERS: dict[str, Callable[[Mapping[str, Any], Layout, int], Row]] = {
    "alpaca": _alpaca,
    "messages": _conversation,
    "sharegpt": _conversation,
    "prompt-completion": _prompt_completion,
    "text": _plain,
}
