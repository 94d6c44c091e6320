"""Examples in one row, without padding: as a prefix tree that computes what they share once, or side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.data.batch import Batch, Term, add_terms, counts, need_some, term_tensors
from trimtab.data.encode import Example
from trimtab.ops.tree import Tree


def pack(examples: Sequence[Example], pad_id: int = 0, *, share: bool = False) -> Batch:
    """`examples` in a single row; no example sees another.

    Tensors are [1, tokens]. What follows an example's last predictor is left out: nothing reads it. share: every
    distinct prefix stands once, in depth-first order, and what follows it attends to it; the loss has a term for each
    target of each example, equal ones counted. pad_id is not used; it is there so that `pad` and `pack` are called
    alike. Raises UsageError without examples.
    """
    need_some(examples)
    ids: list[int] = []
    depths: list[int] = []
    end: list[int] = []
    path: list[int] = []  # where the tokens of the newest example stand
    places: list[list[int]] = [[] for _ in examples]
    terms: dict[Term, int] = {}
    before: list[int] = []
    read = [example.input_ids[: _read(example)] for example in examples]
    order = list(range(len(examples)))
    if share:  # so that whatever begins alike is neighbours; then the order of the examples does not matter either
        order.sort(key=lambda i: read[i])
    for index in order:
        own = read[index]
        shared = _common(before, own) if share else 0
        for place in path[shared:]:
            end[place] = len(ids)
        path[shared:] = range(len(ids), len(ids) + len(own) - shared)
        ids += own[shared:]
        depths += range(shared, len(own))
        end += [0] * (len(own) - shared)
        add_terms(terms, examples[index], path)
        places[index] = list(path)
        before = own
    for place in path:
        end[place] = len(ids)
    return Batch(
        torch.tensor([ids]),
        torch.tensor([depths]),
        None,
        Tree.of(end),
        *term_tensors(terms),
        *counts(examples),
        tuple(places),
    )


def pack_shared(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """`pack` with every distinct prefix once."""
    return pack(examples, pad_id, share=True)


def _read(example: Example) -> int:
    """How many of an example's tokens anything depends on: those before its last target; the first at least."""
    return max((i for i, target in enumerate(example.supervised) if target and i), default=1)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    together = min(len(a), len(b))
    return next((i for i in range(together) if a[i] != b[i]), together)
