"""Which directions two tasks share (Si et al. 2024, arXiv 2409.01035), beside what random changes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.analyze.directions import Indices, Numbers, Projected, shared
from trimtab.analyze.lifts import Against, against, check_draws
from trimtab.analyze.nulls import generator_for, random_picks
from trimtab.deltas.method import OnProgress
from trimtab.errors import UsageError

FIRST, SECOND = 2, 3  # roles of the random numbers: the two changes are drawn independently


@dataclass(frozen=True)
class Shared:
    """The directions that two changes of one weight share.

    cells [s, s]: 1 where the i-th direction of the first is the j-th of the second. random [s, s]: how often that is
    so of two random changes that keep A. found: the share of the s directions that both have; null: of those, [draws].
    """

    path: str
    shape: tuple[int, int]
    cells: Numbers
    random: Numbers
    found: float
    null: Numbers


def share(first: Projected, second: Projected, directions: int = 8, draws: int = 100, seed: int = 0) -> Shared:
    """Which of the directions that change most are the same in two changes of one weight."""
    if first.shape != second.shape or not np.array_equal(first.sigma, second.sigma):
        raise UsageError(f"{first.path} and {second.path} are not the same weight: compare changes of one base")
    check_draws(draws)
    mine, other = first.picked(directions), second.picked(directions)
    drawn = [
        random_picks(change, generator_for(seed, change.path, role), draws, directions)
        for change, role in ((first, FIRST), (second, SECOND))
    ]
    return Shared(
        first.path,
        first.shape,
        _cells(mine, other),
        _cells(*drawn).mean(0),
        float(shared(mine, other)) / directions,
        shared(*drawn) / directions,
    )


def _cells(first: Indices, second: Indices) -> Numbers:
    cells: Numbers = (first[..., :, None] == second[..., None, :]).astype(np.float64)
    return cells


def share_all(
    first: Mapping[str, Projected],
    second: Mapping[str, Projected],
    directions: int = 8,
    draws: int = 100,
    seed: int = 0,
    progress: OnProgress | None = None,
) -> list[Shared]:
    """`share` for every weight that both change."""
    paths = [path for path in first if path in second]
    found = []
    for number, path in enumerate(paths, start=1):
        found.append(share(first[path], second[path], directions, draws, seed))
        if progress is not None:
            progress(number, len(paths), "")
    return found


@dataclass(frozen=True)
class Sharing:
    """Several weights together: means of cells and random [s, s]; the share of directions that both tasks have.

    chance: that share of two picks at random, s/n.
    """

    label: str
    weights: int
    cells: Numbers
    random: Numbers
    share: Against
    chance: float


def sharing(label: str, found: Sequence[Shared], seed: int = 0) -> Sharing:
    """What two tasks share in some weights."""
    directions = len(found[0].cells)
    return Sharing(
        label,
        len(found),
        np.mean([one.cells for one in found], axis=0),
        np.mean([one.random for one in found], axis=0),
        against([one.found for one in found], [one.null for one in found], [one.path for one in found], seed),
        float(np.mean([directions / min(one.shape) for one in found])),
    )
