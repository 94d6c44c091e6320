"""Random projections by name.

A projection is saved as its `options()`, plain values; `make_projection(**options)` draws the same one again.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from trimtab.errors import UsageError, did_you_mean
from trimtab.subspace.blocks import Fastfood, FastfoodBlocks, Uni
from trimtab.subspace.draws import GENERATOR
from trimtab.subspace.linear import Projection
from trimtab.subspace.matrices import Dense, Sparse, SparseGlobal

__all__ = ["PROJECTIONS", "Projection", "make_projection"]

_CLASSES: dict[str, type[Projection]] = {
    cls.name: cls for cls in (Uni, FastfoodBlocks, Fastfood, Sparse, SparseGlobal, Dense)
}

PROJECTIONS: dict[str, str] = {
    "uni": "one signed entry a row, orthonormal columns; time O(D)",
    "fastfood-blocks": "Fastfood in blocks of 2^⌈log₂ d⌉ rows; time O(D log d)",
    "fastfood": "one Fastfood transform over all tensors, as Li et al. 2018; time O(D log D)",
    "sparse": "sparse, drawn tensor by tensor, as Li et al.'s code; time O(d Σ√n)",
    "sparse-global": "sparse with density 1/√D, as Li et al. 2018 write; time O(d √D)",
    "dense": "independent normal entries, a matrix in memory; time O(d D)",
}
"""Name of each projection and what it is."""


def make_projection(
    name: str, sizes: Sequence[int], d: int, seed: int, *, generator: int = GENERATOR, **options: Any
) -> Projection:
    """A projection from its name and options.

    sizes: entries of each tensor, in order; D is their sum. d: columns, from 1 to D. seed: of the draw. options:
    columns (m ≥ d: the first d columns of one P of m, so that subspaces are nested), cache_bytes (up to which size
    what is drawn is kept), and for both fastfoods diagonal (gaussian or sign). generator: the version that drew a saved
    one. Raises UsageError for an unknown name or option, a value out of range, or another version.
    """
    if name not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise UsageError(f"unknown projection '{name}'{did_you_mean(name, _CLASSES)} (known: {known})")
    if generator != GENERATOR:
        raise UsageError(
            f"projection {name} was drawn by version {generator} of the generator, and this trimtab has version "
            f"{GENERATOR}, which draws other numbers: use the trimtab that made it"
        )
    accepted = [option for cls in _CLASSES[name].__mro__ for option in _options(cls)]
    unknown = [option for option in options if option not in accepted]
    if unknown:
        known = ", ".join(dict.fromkeys(accepted))
        raise UsageError(
            f"projection {name} has no option '{unknown[0]}'{did_you_mean(unknown[0], accepted)} (known: {known})"
        )
    return _CLASSES[name](sizes, d, seed, **options)


def most_dimensions(name: str, sizes: Sequence[int]) -> int:
    """The largest d of a projection of PROJECTIONS over tensors of so many entries: D, or what there is room for."""
    return _CLASSES[name].most(sizes)


def _options(cls: type) -> list[str]:
    """Keyword-only parameters of a class's own constructor."""
    own = cls.__dict__.get("__init__")
    if own is None or cls is object:
        return []
    return [p.name for p in inspect.signature(own).parameters.values() if p.kind is p.KEYWORD_ONLY]
