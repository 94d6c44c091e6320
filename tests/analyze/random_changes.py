"""Changes along made-up core directions, for tests of figures about them."""

from __future__ import annotations

import numpy as np

from trimtab.analyze.directions import Projected


def a_change(
    path: str, sigma: np.ndarray, along: np.ndarray, rank: int | None = None, shape=(64, 96), inputs=None
) -> Projected:
    return Projected(path, shape, rank, sigma, along, inputs)


def some_changes(
    count: int, seed: int, signal: float = 0.0, rank: int | None = 4, seed_of_A: int | None = None
) -> dict[str, Projected]:
    """Noise along 64 directions in each of some layers; signal: of six middling directions that all seeds share.

    seed_of_A: of what the factor A of ΔW = B A is drawn from, where it is not the change's own.
    """
    own, common = np.random.default_rng(seed), np.random.default_rng(77)
    of_A = own if seed_of_A is None else np.random.default_rng(seed_of_A)
    found = {}
    for layer in range(count):
        sigma = np.sort(common.uniform(0.5, 3.0, 64))[::-1].copy()
        along, inputs = own.standard_normal(64), None
        if rank is not None:
            inputs = np.linalg.norm(of_A.standard_normal((64, rank)), axis=1)
            along *= inputs
        along[common.permutation(64)[:6]] += signal * np.arange(6, 0, -1)
        found[f"m.{layer}.q"] = a_change(f"m.{layer}.q", sigma, along, rank, inputs=inputs)
    return found
