"""What the outcomes of a task's questions come to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.tasks.confusion import confusion, f1, interval_of, matthews
from trimtab.tasks.results import Outcome
from trimtab.tasks.statistics import Interval, bootstrap, mean, paired_bootstrap
from trimtab.tasks.task import Item, Task, WordedTask


@dataclass(frozen=True)
class Figures:
    """How a model did on a task, as shares from 0 to 1.

    interval: the 95% bootstrap interval of the accuracy, over questions. chance: what picking a choice at random would
    give; of classification, what always giving the commonest class would. majority: what always giving the commonest
    right answer of these questions would. unparseable: the share of generated texts without an answer, which count as
    wrong; None where nothing is generated. f1, matthews: of classification, with their 95% bootstrap intervals.
    """

    task: str
    items: int
    accuracy: float
    interval: Interval
    chance: float
    majority: float
    unparseable: float | None
    f1: float | None = None
    f1_interval: Interval | None = None
    matthews: float | None = None
    matthews_interval: Interval | None = None


def figures(task: Task, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Figures:
    """What the outcomes of these questions come to."""
    correct = [outcome.correct for outcome in outcomes]
    generated = outcomes[0].text is not None
    majority = max(Counter(item.answer for item in items).values()) / len(items)
    found = Figures(
        task=task.name,
        items=len(outcomes),
        accuracy=mean(correct),
        interval=bootstrap(correct),
        chance=mean([1 / len(item.choices) for item in items]) if isinstance(task, WordedTask) else majority,
        majority=majority,
        unparseable=mean([outcome.prediction is None for outcome in outcomes]) if generated else None,
    )
    return found if isinstance(task, WordedTask) else _with_classes(found, items[0].choices, outcomes)


def _with_classes(found: Figures, classes: Sequence[str], outcomes: Sequence[Outcome]) -> Figures:
    predictions = [str(outcome.prediction) for outcome in outcomes]
    table = confusion([outcome.answer for outcome in outcomes], predictions, classes)
    return dataclasses.replace(
        found,
        f1=float(f1(table)),
        f1_interval=interval_of(f1, table),
        matthews=float(matthews(table)),
        matthews_interval=interval_of(matthews, table),
    )


def plain(found: Figures) -> dict[str, Any]:
    """Figures for JSON: intervals as pairs, and nothing about classes where there are none."""
    row = dataclasses.asdict(found)
    own = {key: [value["low"], value["high"]] if isinstance(value, dict) else value for key, value in row.items()}
    return {key: value for key, value in own.items() if value is not None or key == "unparseable"}


def gains(task: Task, items: Sequence[Item], before: Sequence[Outcome], after: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracy, F1 and Matthews before and after, for a report; chance is always giving the commonest class."""
    classes, answers = items[0].choices, [item.answer for item in items]
    commonest = Counter(answers).most_common(1)[0][0]
    always = confusion(answers, [commonest] * len(items), classes)
    old, new = (plain(figures(task, items, outcomes)) for outcomes in (before, after))
    change = paired_bootstrap([outcome.correct for outcome in before], [outcome.correct for outcome in after])
    found: dict[str, Any] = {
        key: {
            "before": old[key],
            "after": new[key],
            "interval_before": old[ends],
            "interval_after": new[ends],
            "resampled": "rows",
            "resampled_number": len(items),
            "chance": chance,
            "items": len(items),
        }
        for key, ends, chance in (
            ("accuracy", "interval", new["majority"]),
            ("f1", "f1_interval", float(f1(always))),
            ("matthews", "matthews_interval", float(matthews(always))),
        )
    }
    found["accuracy"]["interval_of_change"] = [change.low, change.high]
    return found
