"""What models are tested on, one file per family, and the statistics they are reported with.

A new family for `trimtab eval` is one new file here and a line in TASKS for each of its tasks.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from trimtab.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from trimtab.tasks.task import Task


@dataclass(frozen=True)
class Listed:
    """What is known of a task by its name.

    what: what it asks, in one line. command: the one that runs it. place: its class, where that is `trimtab eval`.
    """

    what: str
    command: str
    place: str = ""


COMMONSENSE = "trimtab.tasks.commonsense:Commonsense"
CLASSES = "trimtab.tasks.nlu:Classification"

TASKS: dict[str, Listed] = {
    "naming": Listed("name a Python function from its body, modules apart; exact match and subtoken F1", "demo"),
    "knowledge": Listed("80 general-knowledge questions with four choices; what a model forgot", "demo"),
    "arc_easy": Listed("grade-school science, the easier questions (ARC-e): 3 to 5 choices", "eval", COMMONSENSE),
    "arc_challenge": Listed("grade-school science, the harder questions (ARC-c): 3 to 5 choices", "eval", COMMONSENSE),
    "openbookqa": Listed("elementary science with common knowledge (OBQA): 4 choices", "eval", COMMONSENSE),
    "boolq": Listed("yes-or-no questions without their passage (BoolQ): true or false", "eval", COMMONSENSE),
    "piqa": Listed("which of two ways gets an everyday thing done (PIQA); test rows alone", "eval", COMMONSENSE),
    "sst2": Listed("is a movie review's sentence positive (SST-2); a trained head", "eval", CLASSES),
    "mrpc": Listed("do two sentences mean the same (MRPC); a trained head", "eval", CLASSES),
    "classification": Listed("the labels of your own sentences, or pairs of them; a trained head", "eval", CLASSES),
}
"""Name of each task, and what is known of it without loading torch."""


def make_task(name: str) -> Task:
    """The task of that name. UsageError for one that is not there, or that `trimtab eval` does not run."""
    run_by_eval = [known for known, listed in TASKS.items() if listed.place]
    if name not in TASKS:
        raise UsageError(
            f"unknown task '{name}'{did_you_mean(name, run_by_eval)} (trimtab eval runs: {', '.join(run_by_eval)})"
        )
    listed = TASKS[name]
    if not listed.place:
        raise UsageError(f"task '{name}' is part of trimtab {listed.command}; eval runs: {', '.join(run_by_eval)}")
    module, _, cls = listed.place.partition(":")
    return cast("Task", getattr(importlib.import_module(module), cls)(name))
