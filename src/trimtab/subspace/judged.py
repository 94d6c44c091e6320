"""What a score has to be clear of, so that a dimension found by it says something."""

from __future__ import annotations

import math
from typing import NamedTuple

from trimtab.errors import TrimtabError
from trimtab.subspace.crossing import Threshold, reaches
from trimtab.subspace.training import Outcome


class NoDimension(TrimtabError, ValueError):
    """There is no intrinsic dimension to find: the threshold says nothing, or training itself failed.

    reason: why, in a few words for a table.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Judged(NamedTuple):
    """A split that runs are judged by: train, validation or test. chance: what guessing scores. examples: how many."""

    split: str
    chance: float
    examples: int

    @property
    def noise(self) -> float:
        """Twice the standard error of what guessing scores."""
        return 2 * math.sqrt(max(self.chance * (1 - self.chance), 0.0) / max(self.examples, 1))

    @property
    def clear(self) -> float:
        """The score above which something was learned."""
        return self.chance + self.noise

    def of(self, outcome: Outcome) -> float:
        """The score of a run on this split."""
        return float(getattr(outcome, self.split))


def refuse_chance(wanted: float, scored: Judged, threshold: Threshold) -> None:
    """NoDimension unless the threshold is above what guessing scores by twice its standard error."""
    if wanted <= scored.clear:
        raise NoDimension(
            "threshold near chance",
            f"the threshold, {threshold}, comes to {wanted:.3f}{' at most' if threshold.mode == 'local' else ''}, but "
            f"guessing scores {scored.chance:.3f} give or take {scored.noise:.3f} on {scored.examples:,} examples: any "
            "d would pass. Train longer, score on more examples, or choose another threshold or task",
        )


def refuse_baseline(mean: float, wanted: float, scored: Judged, threshold: Threshold) -> None:
    """NoDimension for a baseline at chance, or below the threshold: no subspace can be expected to do better."""
    if mean <= scored.clear:
        raise NoDimension(
            "baseline near chance",
            f"training all parameters comes to {mean:.3f}, and guessing scores {scored.chance:.3f} give or take "
            f"{scored.noise:.3f}: nothing is learned. Train longer, or with another learning rate (--lr)",
        )
    if not reaches(mean, wanted):
        raise NoDimension(
            "baseline below the threshold",
            f"training all parameters comes to {mean:.3f}, below the threshold, {threshold}: no d would be expected to "
            "reach it. Train longer, or choose a lower threshold",
        )


def refuse_start(mean: float, wanted: float, threshold: Threshold) -> None:
    """NoDimension where θ0 reaches the threshold."""
    if reaches(mean, wanted):
        raise NoDimension(
            "reached without training",
            f"before any training the model comes to {mean:.3f}, and the threshold, {threshold}, to {wanted:.3f}: no "
            "dimension is needed, and any d would pass. Choose a higher threshold, or another task",
        )
