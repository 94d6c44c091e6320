"""Sentences and pairs of sentences with their labels, from tab-separated files. Imports no torch.

Three shapes are known: a header that names label and sentence, or label, sentence1 and sentence2; the header of the
Microsoft Research Paraphrase Corpus; and, without a header, a sentence and a label. Quotes are characters like others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.data.read import read_text
from trimtab.errors import FormatError, UsageError

MOST_CLASSES = 100
"""More labels than these, in a file without a header, are no labels: its columns are others."""
MRPC = {"quality": "label", "#1 string": "sentence1", "#2 string": "sentence2"}
EXPECTED = (
    "expected a header with label and sentence, or label, sentence1 and sentence2, separated by tabs; or in each line "
    "a sentence and a label"
)


@dataclass(frozen=True)
class LabelledRow:
    """A sentence, or a pair of them, with its label as it is written. line: in the file, counted from 1."""

    first: str
    second: str | None
    label: str
    line: int


def read_labelled(path: str | Path, *, limit: int | None = None) -> tuple[LabelledRow, ...]:
    """The rows of a file, gzipped or not. limit: the first so many. Raises UsageError, naming the file and the line."""
    path = Path(path).expanduser()
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}, but must be at least 1 row")
    if not path.is_file():
        raise UsageError(f"{path} is a folder; give one file of rows" if path.is_dir() else f"no such file: {path}")
    text = read_text(path)
    lines = [(n, line.rstrip("\r").split("\t")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    columns, headed = _columns(lines[0][1], path.name)
    rows = tuple(_row(fields, columns, n, len(lines[0][1]), path.name) for n, fields in lines[headed:][:limit])
    if not rows:
        raise UsageError(f"{path.name} is empty: it holds a header and no rows")
    found = {row.label for row in rows}
    if not headed and len(found) > MOST_CLASSES:
        raise FormatError(f"{path.name} has {len(found):,} different labels in its second column: {EXPECTED}")
    return rows


def class_names(rows: Sequence[LabelledRow], name: str) -> tuple[str, ...]:
    """The different labels, as numbers where all are, else by the alphabet. UsageError for fewer than two.

    name: of the file they were read from.
    """
    found = {row.label for row in rows}
    if len(found) < 2:
        raise UsageError(f"every row of {name} has the label '{rows[0].label}': there is nothing to tell apart")
    try:
        return tuple(sorted(found, key=int))
    except ValueError:
        return tuple(sorted(found))


def check_classes(rows: Sequence[LabelledRow], classes: Sequence[str], name: str, *, each: bool = True) -> None:
    """UsageError for a row of another class, naming its line, and (each) for a class without a row."""
    known = ", ".join(classes)
    for row in rows:
        if row.label not in classes:
            raise UsageError(f"{name} line {row.line} has the label '{row.label}', but the classes are {known}")
    missing = [label for label in classes if label not in {row.label for row in rows}] if each else []
    if missing:
        raise UsageError(f"{name} has no row of class {' or '.join(missing)} in its {len(rows):,} rows ({known})")


def hold_out(
    rows: Sequence[LabelledRow], share: float, seed: int
) -> tuple[tuple[LabelledRow, ...], tuple[LabelledRow, ...]]:
    """(the rest, the share of each class drawn at random), both in the order of the file; of each class one at least.

    Raises UsageError for a share that is not between 0 and 1, and for a class of a single row.
    """
    if not 0 < share < 1:
        raise UsageError(f"hold_out is {share}, but must be a share between 0 and 1")
    held: set[int] = set()
    for label, count in Counter(row.label for row in rows).items():
        if count < 2:
            raise UsageError(f"only one row has the label '{label}', so none of that class can be held out")
        places = [i for i, row in enumerate(rows) if row.label == label]
        drawn = min(count - 1, max(1, round(share * count)))
        held.update(random.Random(f"{seed} {label}").sample(places, drawn))
    return _part(rows, (i for i in range(len(rows)) if i not in held)), _part(rows, sorted(held))


def _part(rows: Sequence[LabelledRow], places: Iterable[int]) -> tuple[LabelledRow, ...]:
    return tuple(rows[i] for i in places)


def _columns(first: Sequence[str], name: str) -> tuple[dict[str, int], bool]:
    """Where label and sentences are, and whether the first line is a header."""
    header = [MRPC.get(field.strip().lower(), field.strip().lower()) for field in first]
    for wanted in (("label", "sentence"), ("label", "sentence1", "sentence2")):
        if all(header.count(column) == 1 for column in wanted):
            return {column: header.index(column) for column in wanted}, True
    if len(first) == 2 and not {"label", "sentence", "sentence1"} & set(header):
        return {"sentence": 0, "label": 1}, False
    raise FormatError(f"{name} begins with {len(first)} columns ({', '.join(first)[:80]}): {EXPECTED}")


def _row(fields: Sequence[str], columns: dict[str, int], line: int, width: int, name: str) -> LabelledRow:
    if len(fields) != width:
        raise FormatError(f"{name} line {line} has {len(fields)} columns, but its first line has {width}")
    values = {column: fields[place].strip() for column, place in columns.items()}
    for column, value in values.items():
        if not value:
            raise FormatError(f"{name} line {line} has an empty {column}")
    first = values.get("sentence") or values["sentence1"]
    return LabelledRow(first, values.get("sentence2"), values["label"], line)
