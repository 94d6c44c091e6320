"""Where the directions that a change picks stand, and how much of it they hold, beside random changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.analyze.directions import Indices, Numbers, Projected, shared, top
from trimtab.analyze.lifts import Against, against, check_draws
from trimtab.analyze.nulls import generator_for, random_rates

FIGURES = ("smallest", "held")
"""smallest: the share of the picked directions that are among the s smallest σ. held: the share of Σ δᵢ they hold."""

ROLE = 1  # of the random numbers


@dataclass(frozen=True)
class Picks:
    """The picked directions of one weight, FIGURES of them, and of random changes of the same kind and A, [draws].

    rates, along: δᵢ and cᵢ of the picked ones; the one that changes most stands first.
    """

    path: str
    shape: tuple[int, int]
    rank: int | None
    picked: Indices
    rates: Numbers
    along: Numbers
    found: Mapping[str, float]
    null: Mapping[str, Numbers]


def picks(projected: Projected, directions: int = 8, draws: int = 100, seed: int = 0) -> Picks:
    """The directions of one weight that change most."""
    check_draws(draws)
    random = random_rates(projected, generator_for(seed, projected.path, ROLE), draws).astype(np.float64)
    picked = projected.picked(directions)
    found = _figures(projected.rates[None], directions)
    return Picks(
        projected.path, projected.shape, projected.rank, picked, projected.rates[picked], projected.along[picked],
        {name: float(value[0]) for name, value in found.items()}, _figures(random, directions),
    )  # fmt: skip


def _figures(rates: Numbers, directions: int) -> dict[str, Numbers]:
    """FIGURES of each row of rates [rows, n]."""
    best = top(rates, directions)
    n = rates.shape[-1]
    held = np.take_along_axis(rates, best, -1).sum(-1) / rates.sum(-1)
    return {"smallest": shared(best, np.arange(n - directions, n)) / directions, "held": held}


def picked_like_noise(found: Sequence[Picks], seed: int = 0) -> dict[str, Against]:
    """FIGURES of some weights together, against random changes."""
    paths = [one.path for one in found]
    return {
        name: against([o.found[name] for o in found], [o.null[name] for o in found], paths, seed) for name in FIGURES
    }
