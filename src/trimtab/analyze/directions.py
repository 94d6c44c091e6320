"""Which core directions of a frozen weight a change moves (Si et al. 2024, arXiv 2409.01035).

With the singular value decomposition W = Σ σᵢ uᵢ vᵢᵀ, uᵢ vᵢᵀ are the core directions of W. A change ΔW has the
projection cᵢ = uᵢᵀ ΔW vᵢ on one, and the change rate δᵢ = |cᵢ| / (σᵢ + ε). The s directions that change most stand for
what a task needs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.analyze.changes import Change, Changed
from trimtab.deltas.core_bases import CoreBases, change_rates, core_bases
from trimtab.deltas.method import OnProgress
from trimtab.errors import UsageError

log = logging.getLogger("trimtab")

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]


class Projected(NamedTuple):
    """A change along the core directions of its weight, in the order of σ descending.

    shape: (out, in). rank: of the factors of ΔW = B A; None for a dense one. sigma, along: [n], σᵢ and cᵢ = uᵢᵀ ΔW vᵢ.
    inputs: [n], ‖A vᵢ‖, how much of a direction's input the change reads; None for a dense one.
    """

    path: str
    shape: tuple[int, int]
    rank: int | None
    sigma: Numbers
    along: Numbers
    inputs: Numbers | None = None

    @property
    def rates(self) -> Numbers:
        """δᵢ = |cᵢ| / (σᵢ + ε), [n]."""
        return np.abs(self.along) * rate_of_one(self.sigma)

    def picked(self, count: int) -> Indices:
        """The directions that change most, the first one most."""
        return top(self.rates, count)


class Scores(NamedTuple):
    """How well s predicted directions meet the actual ones, both ordered by change rate.

    accuracy: |predicted top s ∩ actual top 2s| / s. recall: |predicted top s ∩ actual top s/2| / (s/2). With s = 8,
    those of Si et al. 2024 (arXiv 2409.01035).
    """

    accuracy: Numbers
    recall: Numbers


def scores(predicted: Indices, actual: Indices, directions: int) -> Scores:
    """The scores of predicted [..., s or more] against actual [..., 2s or more], each row by itself."""
    half, predicted = max(1, directions // 2), predicted[..., :directions]
    return Scores(
        shared(predicted, actual[..., : 2 * directions]) / directions,
        shared(predicted, actual[..., :half]) / half,
    )


def shared(first: Indices, second: Indices) -> Numbers:
    """How many indices stand in both, [...]. first: [..., p], second: [..., q], each without repeats."""
    found: Numbers = (first[..., :, None] == second[..., None, :]).sum((-2, -1), dtype=np.float64)
    return found


def top(rates: NDArray[np.floating], count: int) -> Indices:
    """The places of the `count` largest of rates [..., n], the largest first, [..., count]."""
    if rates.ndim == 1:
        return np.argsort(-rates, kind="stable")[:count]
    best = np.argpartition(-rates, count - 1, axis=-1)[..., :count] if count < rates.shape[-1] else None
    if best is None:
        return np.argsort(-rates, axis=-1)
    order = np.argsort(-np.take_along_axis(rates, best, -1), axis=-1)
    return np.take_along_axis(best, order, -1)


def rate_of_one(sigma: Numbers) -> Numbers:
    """1 / (σᵢ + ε), [n]: the rates of a change whose projection on every direction is 1."""
    ones, one = torch.ones(1, len(sigma)), torch.ones(1, 1)
    bases = CoreBases(ones, torch.from_numpy(sigma).float(), ones)
    return change_rates(bases, one, one).double().numpy()


@torch.no_grad()
def project(changed: Changed) -> Projected:
    """A change along the core directions of its weight; from factors no dense ΔW is formed.

    Raises UsageError for a change that is not finite. The core bases come from disk where they are.
    """
    bases = core_bases(changed.weight)
    along, rank, inputs = _along(bases, changed.change())
    if not bool(along.isfinite().all()):
        raise UsageError(f"the change of {changed.path} is not finite")
    shape = (changed.weight.shape[0], changed.weight.shape[1])
    read = None if inputs is None else inputs.double().numpy()
    return Projected(changed.path, shape, rank, bases.sigma.double().numpy(), along.double().numpy(), read)


def _along(bases: CoreBases, change: Change) -> tuple[Tensor, int | None, Tensor | None]:
    """cᵢ = uᵢᵀ ΔW vᵢ [n], the rank of the factors, and ‖A vᵢ‖ [n]. Costs r n (out + in) with factors, else n out in."""
    if isinstance(change, Tensor):
        return (bases.U * (change.detach().float().cpu() @ bases.V)).sum(0), None, None
    B, A = (factor.detach().float().cpu() for factor in change)
    used = B.any(0) & A.any(1)  # LoRA-Dash has columns of zeros until its directions are chosen
    read = A[used] @ bases.V
    return ((bases.U.T @ B[:, used]) * read.T).sum(1), int(used.sum()), read.norm(dim=0)


def project_all(changes: Sequence[Changed], progress: OnProgress | None = None) -> dict[str, Projected]:
    """Every change along the core directions of its weight, by path; weights that do not change are left out, and told.

    Core bases not on disk are computed one by one: `core_bases.prepare` does several at a time. Raises UsageError
    where nothing changes at all.
    """
    found, still = {}, []
    for number, changed in enumerate(changes, start=1):
        projected = project(changed)
        if projected.along.any():
            found[changed.path] = projected
        else:
            still.append(changed.path)
        if progress is not None:
            progress(number, len(changes), "")
    if not found:
        raise UsageError("no weight is changed at all: there are no directions to speak of")
    if still:
        log.warning("%d of %d weights are not changed and left out, the first %s", len(still), len(changes), still[0])
    return found


def check_directions(directions: int, changes: Iterable[Changed], *, compared: bool = False) -> None:
    """UsageError unless every weight has that many core directions; twice as many where changes are compared."""
    if directions < 1:
        raise UsageError(f"directions is {directions}, but must be at least 1")
    for changed in changes:
        n = min(changed.weight.shape)
        if directions > n:
            raise UsageError(f"{directions} directions are above the {n} core directions of {changed.path}")
        if compared and 2 * directions > n:
            raise UsageError(
                f"accuracy looks at twice the {directions} directions, which is above the {n} core directions of "
                f"{changed.path}: take fewer"
            )
