"""Which parameters are of one layer: a transformer block, the embeddings, the head; told from their names alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def layer_groups(names: Sequence[str]) -> tuple[int, ...]:
    """For each parameter or module name, the number of its layer; layers are numbered as they first come.

    A layer is what one number in a path stands for, the outermost of several, because blocks lie in a list:
    `encoder.layer.3`. A number that a whole path begins with is taken only where there is no other: containers put
    around models have such. What is in no list is grouped by the child of the modules that lead to the lists:
    `bert.embeddings`, `classifier`.
    """
    paths = [name.split(".") for name in names]
    lists = [_in_list(path) for path in paths]
    # A model may lie within others, whose names all begin with.
    shared = [column[0] for column in itertools.takewhile(lambda c: len(set(c)) == 1, zip(*paths, strict=False))]
    trunk = {tuple(path[:end]) for path in (*filter(None, lists), [*shared, ""]) for end in range(len(path))}
    layers = [tuple(found) or _child(path, trunk) for path, found in zip(paths, lists, strict=True)]
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
    return tuple(numbers[layer] for layer in layers)


def _in_list(parts: list[str]) -> list[str]:
    """A path up to the number of its block; empty where it has none."""
    places = [place for place, part in enumerate(parts) if part.isdigit()]
    place = next((place for place in places if place > 0), places[0] if places else -1)
    return parts[: place + 1]


def _child(parts: list[str], trunk: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The shortest beginning of a path that does not lead to the lists."""
    return next((tuple(parts[:end]) for end in range(1, len(parts)) if tuple(parts[:end]) not in trunk), tuple(parts))
