"""Random changes of a weight, seen along its core directions: what directions noise would pick.

Divided by σ, noise stands out where σ is small, whatever the task. So a figure about picked directions says something
only beside the same figure of random changes.

Of a change ΔW = B A, what A reads is no finding either: adapters trained with one seed begin with the same A, some
methods take theirs from W, and the inputs of all tasks move it alike. So a random change keeps A and draws B.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from trimtab.analyze.directions import Indices, Numbers, Projected, rate_of_one, top

BLOCK = 4_000_000
"""Numbers of one block of draws: 16 MB in fp32."""

Drawn = NDArray[np.float32]


def generator_for(seed: int, path: str, role: int = 0) -> np.random.Generator:
    """The random numbers of one weight, whichever others are measured. role: tells apart those of one weight."""
    return np.random.default_rng([seed, zlib.crc32(path.encode()), role])


def random_along(
    generator: np.random.Generator, draws: int, n: int, rank: int | None, inputs: Numbers | None = None
) -> Drawn:
    """cᵢ = uᵢᵀ ΔW vᵢ of random changes, [draws, n], without making them.

    Dense: the entries of ΔW are independent standard Gaussians, and so are the cᵢ, for uᵢ vᵢᵀ are orthonormal.
    Of a rank r: ΔW = B A with Gaussian B. Uᵀ B is Gaussian again, as U has orthonormal columns, so cᵢ = Σ_k bᵢₖ aₖᵢ
    is a Gaussian of standard deviation ‖A vᵢ‖. inputs: those, [n], of an A that is kept; None: A is Gaussian too, and
    ‖A vᵢ‖² is χ² with r degrees of freedom.
    """
    along = generator.standard_normal((draws, n), dtype=np.float32)
    if inputs is not None:
        along *= inputs.astype(np.float32)
    elif rank is not None:
        along *= np.sqrt(2 * generator.standard_gamma(rank / 2, (draws, n), dtype=np.float32))
    return along


def random_rates(like: Projected, generator: np.random.Generator, draws: int) -> Drawn:
    """Change rates of random changes of the same weight, kind, A and size Σ cᵢ², [draws, n]."""
    along = random_along(generator, draws, len(like.sigma), like.rank, like.inputs)
    size = np.sqrt((like.along**2).sum()) / np.sqrt((along.astype(np.float64) ** 2).sum(1, keepdims=True))
    rates: Drawn = (np.abs(along) * size * rate_of_one(like.sigma)).astype(np.float32)
    return rates


def random_picks(
    like: Projected, generator: np.random.Generator, draws: int, count: int, *, keep: bool = True
) -> Indices:
    """The directions that random changes of the same weight, kind and rank move most, [draws, count].

    keep: A as it is; otherwise it is drawn as well.
    """
    each = rate_of_one(like.sigma).astype(np.float32)
    rows = max(1, BLOCK // len(each))
    blocks = [min(rows, draws - start) for start in range(0, draws, rows)]
    inputs = like.inputs if keep else None
    drawn = (np.abs(random_along(generator, some, len(each), like.rank, inputs)) * each for some in blocks)
    return np.concatenate([top(rates, count) for rates in drawn])
