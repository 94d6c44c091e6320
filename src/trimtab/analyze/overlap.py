"""Whether one change predicts the directions of another: an adapter early in training those of full fine-tuning, say.

The figures are those of Si et al. 2024 (arXiv 2409.01035), and never without what noise gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.analyze.directions import Indices, Projected, Scores, scores
from trimtab.analyze.lifts import LEAST_LAYERS, Against, against, check_draws
from trimtab.analyze.nulls import generator_for, random_picks
from trimtab.deltas.method import OnProgress
from trimtab.errors import UsageError

NULLS = ("random", "same_A", "prediction", "smallest", "chance")
"""random: two independent random changes. same_A: two that keep their own A, where they have one. prediction: one that
does against the actual directions. smallest: the s smallest σ against the actual directions. chance: s directions drawn
at random."""


@dataclass(frozen=True)
class Overlap:
    """The scores of one weight, and of each of NULLS: [draws] where it is drawn, else [1]. found: []."""

    path: str
    shape: tuple[int, int]
    picked: Indices
    actual: Indices
    found: Scores
    nulls: Mapping[str, Scores]


def compare(predicted: Projected, actual: Projected, directions: int = 8, draws: int = 100, seed: int = 0) -> Overlap:
    """The directions of one change of a weight as a prediction of another's, beside the nulls."""
    if predicted.shape != actual.shape or not np.array_equal(predicted.sigma, actual.sigma):
        raise UsageError(f"{predicted.path} and {actual.path} are not the same weight: compare changes of one base")
    check_draws(draws)
    n, twice = len(actual.sigma), 2 * directions
    generator = generator_for(seed, predicted.path)
    drawn, kept = (
        (
            random_picks(predicted, generator, draws, directions, keep=keep),
            random_picks(actual, generator, draws, twice, keep=keep),
        )
        for keep in (False, True)
    )
    mine, true = predicted.picked(directions), actual.picked(twice)
    smallest = np.arange(n - 1, n - 1 - directions, -1)
    nulls = {
        "random": scores(*drawn, directions),
        "same_A": scores(*kept, directions),
        "prediction": scores(kept[0], true, directions),
        "smallest": _one(scores(smallest, true, directions)),
        "chance": Scores(np.array([min(1.0, twice / n)]), np.array([directions / n])),
    }
    return Overlap(predicted.path, predicted.shape, mine, true, scores(mine, true, directions), nulls)


def _one(found: Scores) -> Scores:
    return Scores(np.atleast_1d(found.accuracy), np.atleast_1d(found.recall))


def compare_all(
    predicted: Mapping[str, Projected],
    actual: Mapping[str, Projected],
    directions: int = 8,
    draws: int = 100,
    seed: int = 0,
    progress: OnProgress | None = None,
) -> list[Overlap]:
    """`compare` for every weight that both change. UsageError where there is none."""
    paths = [path for path in predicted if path in actual]
    if not paths:
        raise UsageError(f"the reference changes none of the weights, the first {next(iter(predicted), 'none')}")
    found = []
    for number, path in enumerate(paths, start=1):
        found.append(compare(predicted[path], actual[path], directions, draws, seed))
        if progress is not None:
            progress(number, len(paths), "")
    return found


@dataclass(frozen=True)
class Group:
    """The scores of several weights, against each of NULLS."""

    label: str
    directions: int
    weights: int
    layers: int
    accuracy: Mapping[str, Against]
    recall: Mapping[str, Against]

    @property
    def predicts(self) -> bool:
        """Whether both scores are above every null."""
        return not self.short_of("accuracy") and not self.short_of("recall")

    def short_of(self, score: str) -> list[str]:
        """The nulls that a score does not clear."""
        figures: Mapping[str, Against] = getattr(self, score)
        return [null for null in NULLS if figures[null].answer != "more"]

    def null_name(self, null: str) -> str:
        """What a null is, in words."""
        return {
            "random": "two random changes",
            "same_A": "two that keep A",
            "prediction": "a random prediction",
            "smallest": f"the {self.directions} smallest σ",
            "chance": "chance",
        }[null]

    def verdict(self) -> str:
        """What the scores say, in a sentence; that the directions are predicted only where every null is cleared."""
        head = f"{self.label} ({self.weights} weight{'s' * (self.weights > 1)}): "
        if self.layers < LEAST_LAYERS:
            layers = f"{self.layers} layer{'s are' if self.layers > 1 else ' is'}"
            return f"{head}no verdict, for {layers} too few for an interval (at least {LEAST_LAYERS})"
        if self.predicts:
            figures = " and ".join(f"{score} {getattr(self, score)['random'].found:.2f}" for score in Scores._fields)
            return f"{head}the adapter predicts the directions; {figures} are above every null"
        short = {null for score in Scores._fields for null in self.short_of(score)}
        what = f"the {self.directions} smallest σ give" if short == {"smallest"} else "noise gives"
        return f"{head}not more than {what}; {'; '.join(filter(None, map(self._shortfall, Scores._fields)))}"

    def _shortfall(self, score: str) -> str:
        figures: Mapping[str, Against] = getattr(self, score)
        nulls = [f"{self.null_name(null)} ({figures[null].null:.2f})" for null in self.short_of(score)]
        listed = " and ".join([", ".join(nulls[:-1]), nulls[-1]] if len(nulls) > 1 else nulls)
        return f"{score} {figures['random'].found:.2f} does not clear {listed}" if nulls else ""


def group(label: str, overlaps: Sequence[Overlap], directions: int, seed: int = 0) -> Group:
    """The scores of some weights together."""
    paths = [overlap.path for overlap in overlaps]
    figures = {
        score: {
            null: against(
                [float(getattr(overlap.found, score)) for overlap in overlaps],
                [getattr(overlap.nulls[null], score) for overlap in overlaps],
                paths,
                seed,
            )
            for null in NULLS
        }
        for score in Scores._fields
    }
    layers = figures["accuracy"]["random"].layers
    return Group(label, directions, len(overlaps), layers, figures["accuracy"], figures["recall"])
