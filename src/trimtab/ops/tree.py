"""The shape of a packed row: sequences that begin alike share what they begin with, as a tree of prefixes.

Tokens stand in depth-first order; end[j] is one past the last descendant of token j. Token i sees the tokens before it
in its own sequence, which is to say

    i sees j   iff   j ≤ i < end[j]

A run of tokens without a branch in it is a segment [a, b), whose tokens share one end. Attention goes by blocks of
rows: rows of one segment see all of its path but what comes after them; small segments that follow one another are one
block, with a mask for what some of its rows do not see, where that wastes less than another block costs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Segment = tuple[int, int, int]
"""(a, b, e): the tokens [a, b) without a branch among them, and the end e that they share."""
Span = tuple[int, int]
"""The tokens from the first number on and before the second."""
Path = tuple[Span, ...]
"""Spans in order, none next to another."""
Block = tuple[Span, Path, Tensor]
"""Rows; the tokens that any of them sees, which end with the last of the rows; and the mask of the last m of these
tokens, [rows, m], minus infinity where a row does not see one: every row sees all those before."""

ROWS = 96
"""At most as many rows a block: few waste products on the triangle, many make the products slow."""
WASTE = 4000
"""So many pairs of a row and a token it does not see are computed rather than to begin another block."""


class Tree:
    """The shape of a packed row. end: [N] int64 on the device of the tokens; segments: the same, for slicing."""

    def __init__(self, end: Tensor, segments: Sequence[Segment]) -> None:
        self.end = end
        self.segments = tuple(segments)
        self._block_mask: Any = None

    @staticmethod
    def of(end: Sequence[int]) -> Tree:
        """The tree of the ends of its tokens. Token j goes on j - 1's segment iff both have the same end."""
        starts = [j for j, stop in enumerate(end) if j == 0 or stop != end[j - 1]]
        segments = [(a, b, end[a]) for a, b in zip(starts, [*starts[1:], len(end)], strict=True)]
        return Tree(torch.tensor(end), segments)

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The tokens in order, at most ROWS in a block."""
        found: list[_Group] = []
        for (a, b, _), before in self._sights():
            size = math.ceil((b - a) / math.ceil((b - a) / ROWS))
            for start in range(a, b, size):
                stop = min(start + size, b)
                sight = before | _bits(a, stop)
                rows = _Group(start, stop, sight, sight)
                if found and found[-1].takes(rows):
                    rows = found.pop().along_with(rows)
                found.append(rows)
        return tuple(self._block(rows) for rows in found)

    def _sights(self) -> Iterator[tuple[Segment, int]]:
        """Each segment and the tokens before it that it sees."""
        path: list[Segment] = []
        for segment in self.segments:
            while path and path[-1][2] <= segment[0]:
                path.pop()
            yield segment, sum(_bits(a, b) for a, b, _ in path)
            path.append(segment)

    def _block(self, rows: _Group) -> Block:
        path = _spans(rows.some)
        masked = (rows.some & ~(rows.every & _bits(0, rows.start))).bit_count()
        seen = torch.cat([torch.arange(a, b) for a, b in path])[-masked:]
        row = torch.arange(rows.start, rows.stop).unsqueeze(1)
        unseen = (seen > row) | (row >= self.end.cpu()[seen])
        mask = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
        return (rows.start, rows.stop), path, mask

    @functools.cached_property
    def shapes(self) -> int:
        """How many blocks there are of different numbers of rows or of tokens seen."""
        return len({(stop - start, sum(b - a for a, b in path)) for (start, stop), path, _ in self.blocks})

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return max(before.bit_count() + b - a for (a, b, _), before in self._sights())

    def to(self, device: torch.device | str) -> Tree:
        """The same tree with `end` on `device`."""
        end = self.end.to(device)
        return self if end is self.end else Tree(end, self.segments)

    def mask(self) -> Tensor:
        """[N, N] bool: whether token i (row) attends to token j (column)."""
        at = torch.arange(len(self.end), device=self.end.device)
        return (at <= at.unsqueeze(1)) & (at.unsqueeze(1) < self.end)

    def block_mask(self) -> Any:
        """flex attention's form of the mask, made once."""
        if self._block_mask is None:
            from torch.nn.attention.flex_attention import create_block_mask

            end, size = self.end, len(self.end)

            def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return (j <= i) & (i < end[j])

            self._block_mask = create_block_mask(sees, None, None, size, size, device=str(end.device))
        return self._block_mask


class _Group(NamedTuple):
    """The rows [start, stop), what any of them sees and what every one does. Tokens are the bits of a number."""

    start: int
    stop: int
    some: int
    every: int

    def takes(self, more: _Group) -> bool:
        """Whether the rows that follow are better computed along with these."""
        waste = (self.stop - self.start) * (more.some & ~self.some).bit_count()
        waste += (more.stop - more.start) * (self.some & ~more.some).bit_count()
        return more.stop - self.start <= ROWS and waste <= WASTE

    def along_with(self, more: _Group) -> _Group:
        """Both."""
        return _Group(self.start, more.stop, self.some | more.some, self.every & more.every)


def _bits(a: int, b: int) -> int:
    """The tokens [a, b)."""
    return (1 << b) - (1 << a)


def _spans(tokens: int) -> Path:
    """The same tokens as spans."""
    found = []
    while tokens:
        a = (tokens & -tokens).bit_length() - 1
        run = tokens >> a
        b = a + (~run & (run + 1)).bit_length() - 1
        found.append((a, b))
        tokens &= ~_bits(a, b)
    return tuple(found)
