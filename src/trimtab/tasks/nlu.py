"""Sentences and pairs of sentences to be told apart by a trained head: SST-2, MRPC, and files of the user's.

SST-2: Socher et al. 2013, sentences of movie reviews, 1 for positive. MRPC: Dolan and Brockett 2005, pairs of sentences
from the news, 1 for the same meaning. Imports no torch; `tasks.classify` runs models on what is read here.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.data.labelled import LabelledRow, check_classes, class_names, read_labelled
from trimtab.errors import UsageError
from trimtab.tasks.task import VARIABLE, Item, Task


@dataclasses.dataclass(frozen=True)
class Known:
    """What is fixed of a task: its splits in nlu/NAME.SPLIT.tsv.gz, its classes, whether sentences come in pairs."""

    splits: tuple[str, ...]
    classes: tuple[str, ...]
    pairs: bool


KNOWN = {
    "sst2": Known(("train", "dev", "test"), ("0", "1"), pairs=False),
    "mrpc": Known(("train", "test"), ("0", "1"), pairs=True),
}


@dataclasses.dataclass(frozen=True)
class Sentences(Item):
    """A sentence to be classified, `question`, and what it is compared with. line: in the file, from 1."""

    second: str | None
    line: int

    def row(self) -> LabelledRow:
        """As `data.label_batch` takes it."""
        return LabelledRow(self.question, self.second, self.answer, self.line)


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """sst2, mrpc, or `classification`: files of the user's. classes: empty where the file's labels say them."""

    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name in KNOWN:
            fixed = KNOWN[self.name].classes
            if self.classes and set(self.classes) != set(fixed):
                raise UsageError(
                    f"the classes of {self.name} are {', '.join(fixed)}, and not {', '.join(self.classes)}"
                )
            object.__setattr__(self, "classes", self.classes or fixed)

    def file(self, split: str) -> str:
        """UsageError for a split there is not, and for `classification`, which has no files of its own."""
        if self.name not in KNOWN:
            raise UsageError(f"task '{self.name}' has no files of its own: name yours with --data FILE")
        splits = KNOWN[self.name].splits
        if split not in splits:
            raise UsageError(f"{self.name} has no split '{split}'; there is: {', '.join(splits)}")
        return f"nlu/{self.name}.{split}.tsv.gz"

    def path(self, split: str = "test", data: str | Path | None = None, *, flag: str = "--data") -> Path:
        """The file of a split; data may also be a file itself, which is then taken for the split.

        UsageError for what is not there.
        """
        named = Path(data or os.environ.get(VARIABLE) or "").expanduser()
        if data and not named.exists():
            raise UsageError(f"{flag} names {named}, and there is no such file or folder")
        return named if named.is_file() else super().path(split, data, flag=flag)

    def read(self, path: Path) -> tuple[Sentences, ...]:
        """The items of a file; see `rows` for what is refused."""
        rows = self.rows(path)
        return self.items_of(rows, self.classes or class_names(rows, path.name))

    def rows(self, path: Path, limit: int | None = None) -> tuple[LabelledRow, ...]:
        """The rows of a file: of the task's shape and classes, with each class there.

        limit: at most so many, from the first. UsageError for rows of another shape, another class or a class without
        a row; FormatError for a file that is no table of such rows.
        """
        rows = read_labelled(path, limit=limit)
        if self.name in KNOWN and KNOWN[self.name].pairs != (rows[0].second is not None):
            needs = "pairs of sentences" if KNOWN[self.name].pairs else "single sentences"
            raise UsageError(f"{path.name} has other rows than {self.name}, which is of {needs}: give its own file")
        check_classes(rows, self.classes or class_names(rows, path.name), path.name)
        return rows

    def items_of(self, rows: Sequence[LabelledRow], classes: Sequence[str]) -> tuple[Sentences, ...]:
        """Rows as items, with these classes to choose among."""
        return tuple(
            Sentences(i, row.first, tuple(classes), row.label, row.second, row.line) for i, row in enumerate(rows)
        )


@dataclasses.dataclass(frozen=True)
class ClassRecord:
    """What an adapter knows of the classes it was trained to tell apart: it stands in its provenance."""

    task: str
    classes: tuple[str, ...]
    max_length: int

    def to_provenance(self) -> dict[str, Any]:
        """As it is kept in `Adapter.provenance`."""
        return {"task": self.task, "classes": list(self.classes), "max_length": self.max_length}


def class_record(folder: str | Path) -> ClassRecord | None:
    """What the adapter in a folder tells apart; None for one that was not trained by `trimtab train --task`."""
    try:
        own = json.loads((Path(folder) / "trimtab.json").read_text(encoding="utf-8"))
        found = own["provenance"]
        return ClassRecord(str(found["task"]), tuple(map(str, found["classes"])), int(found["max_length"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading it says what is wrong with a file that is broken


def refuse_classifiers(adapters: Mapping[str, str]) -> None:
    """UsageError for an adapter, by name, whose folder holds a classifier, which writes no text."""
    for name, folder in adapters.items():
        record = class_record(folder)
        if record is not None:
            raise UsageError(
                f"adapter '{name}' tells classes apart ({', '.join(record.classes)}) and writes no text: use "
                f"trimtab eval --adapter {folder} --tasks {record.task}"
            )
