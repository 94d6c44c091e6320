"""The checkpoints of one pretraining: which there are, in what order, and whether their dimensions compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trimtab.errors import UsageError
from trimtab.files import name_of
from trimtab.models.load import hub_revision
from trimtab.models.steps import steps_of


def checkpoints_of(given: Sequence[str]) -> tuple[dict[str, str], dict[str, int]]:
    """The checkpoints by label, in the order of their pretraining, and the step of each by label.

    given: folders and REPO@REVISION of a hub, or one folder that holds the checkpoints. Where not all names tell a
    step, the order is that in which they are given, and each step is its place. Raises UsageError for a folder that is
    not there, fewer than two checkpoints, two of one name, and a folder of checkpoints whose names tell no order.
    """
    missing = [name for name in given if not Path(name).expanduser().is_dir() and hub_revision(name)[1] is None]
    if missing:
        raise UsageError(
            f"checkpoints: there is no folder {missing[0]}; those of a hub's repository are named one by one, as "
            "REPO@REVISION"
        )
    whole = len(given) == 1 and hub_revision(given[0])[1] is None
    names = [str(path.parent) for path in Path(given[0]).expanduser().glob("*/config.json")] if whole else list(given)
    if len(names) < 2:
        raise UsageError(
            f"{given[0]}: fewer than two checkpoints, but a series needs two: folders with a config.json, or "
            "REPO@REVISION"
        )
    labels = [hub_revision(name)[1] or name_of(name) for name in names]
    double = [label for label in labels if labels.count(label) > 1]
    if double:
        raise UsageError(
            f"two checkpoints are called {double[0]}, by which their results are kept: measure them apart, or rename a "
            "folder"
        )
    steps = dict(steps_of(labels))
    if whole and not steps:
        few = ", ".join(sorted(labels)[:3])
        raise UsageError(
            f"the names of the checkpoints in {given[0]} tell no order ({few} ...): call them "
            "step100, checkpoint-100 or 100, or name them one by one in the order of their pretraining"
        )
    steps = steps or {label: place for place, label in enumerate(labels)}
    by_label = dict(zip(labels, names, strict=True))
    return {label: by_label[label] for label in sorted(labels, key=lambda label: steps[label])}, steps


def refuse_other_shapes(by_label: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """UsageError unless all checkpoints have parameters of the same names and shapes."""
    (first, shapes), *others = by_label.items()
    for label, own in others:
        name = next((name for name in {**shapes, **own} if shapes.get(name) != own.get(name)), None)
        if name is not None:
            told = " and ".join(
                f"{list(one[name]) if name in one else 'absent'} in {place}"
                for place, one in ((first, shapes), (label, own))
            )
            raise UsageError(
                f"the checkpoints are of different shapes, so that their dimensions do not compare: {name} is {told}"
            )
