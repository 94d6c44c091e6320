"""Projections that are made of blocks of rows, each drawn from the seed by itself: Fastfood, and one entry a row.

No matrix is kept. Rows are computed a chunk of blocks at a time into the result, so that nothing else as long as the
parameter vector is made, and what the chunks draw is kept or, above `cache_bytes`, drawn again for every product.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import did_you_mean
from trimtab.ops.hadamard import hadamard_
from trimtab.subspace.draws import Drawn, Kept, normals, permutations, signs, stream
from trimtab.subspace.linear import Projection

CHUNK = 2**18
"""Rows that are drawn and computed at a time, in whole blocks. Of the draw: another value gives another P."""

DIAGONALS = ("gaussian", "sign")


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << (at_least - 1).bit_length()


class Blocks(Projection):
    """P of `count` blocks of `block` rows each, stacked and cut after D rows."""

    @property
    @abc.abstractmethod
    def block(self) -> int:
        """Rows of a block."""

    @property
    @abc.abstractmethod
    def bytes_a_row(self) -> int:
        """What is drawn for a row."""

    @property
    def count(self) -> int:
        """K = ⌈D / block⌉."""
        return -(-self.D // self.block)

    @functools.cached_property
    def _kept(self) -> Kept:
        return Kept(self.count * self.block * self.bytes_a_row <= self.cache_bytes)

    def _chunks(self) -> Iterator[tuple[int, int, int]]:
        """Each chunk: its number, how many blocks it has, and its first row."""
        most = max(1, CHUNK // self.block)
        for number, first in enumerate(range(0, self.count, most)):
            yield number, min(most, self.count - first), first * self.block

    def _drawn(self, number: int, blocks: int, device: torch.device) -> Drawn:
        return self._kept.get(number, device, functools.partial(self._draw, number, blocks))

    def _expand(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), self.D)
        shared = self._shared(x)
        for number, blocks, row in self._chunks():
            rows = self._expand_chunk(shared, self._drawn(number, blocks, x.device)).view(len(x), -1)
            out[:, row : row + rows.shape[1]] = rows[:, : self.D - row]
        return out

    def _adjoint(self, g: Tensor) -> Tensor:
        total = None
        for number, blocks, row in self._chunks():
            rows, there = g.new_empty(len(g), blocks * self.block), min(self.D - row, blocks * self.block)
            rows[:, :there] = g[:, row : row + there]
            rows[:, there:] = 0.0
            found = self._adjoint_chunk(rows, self._drawn(number, blocks, g.device))
            total = found if total is None else total.add_(found)
        assert total is not None
        return self._shared_adjoint(total)

    @abc.abstractmethod
    def _draw(self, number: int, blocks: int) -> Drawn:
        """What chunk `number` is made of."""

    @abc.abstractmethod
    def _shared(self, x: Tensor) -> Tensor:
        """What is done to x [n, d] once, before all blocks."""

    @abc.abstractmethod
    def _shared_adjoint(self, g: Tensor) -> Tensor:
        """The adjoint of `_shared`; gives [n, d]."""

    @abc.abstractmethod
    def _expand_chunk(self, x: Tensor, drawn: Drawn) -> Tensor:
        """The rows of a chunk, from what `_shared` gave."""

    @abc.abstractmethod
    def _adjoint_chunk(self, g: Tensor, drawn: Drawn) -> Tensor:
        """Its adjoint. g: [n, rows of the chunk], to be written over."""


def _flat(permuted: Tensor) -> Tensor:
    """Permutations [blocks, m] of each block as one of all their rows: [blocks · m]."""
    return (permuted + torch.arange(len(permuted))[:, None] * permuted.shape[1]).view(-1)


class Uni(Blocks):
    """One signed entry a row: θ_i = ± θ_d[j(i)] / √n_j, with n_j the rows that have column j.

    Columns are orthonormal, exactly. As in Uni-LoRA (Li et al. 2025, arXiv 2506.00799), but for signs, and for the rows
    of a column: every m rows one after the other have each of the m columns once, in random order, so that n_j differ
    by one at most and P is a signed permutation at d = D. Time and memory O(D).
    """

    name = "uni"
    bytes_a_row = 9

    @property
    def block(self) -> int:
        return self.columns

    def _draw(self, number: int, blocks: int) -> Drawn:
        order = permutations(blocks, self.block, stream(self.seed, "uni order", number))
        return _flat(order), signs(blocks * self.block, stream(self.seed, "uni signs", number))

    @functools.cached_property
    def _norms(self) -> Tensor:
        """√n_j of the first d columns: [d], fp64."""
        rows = torch.full((self.columns,), self.D // self.columns, dtype=torch.float64)
        number, blocks, _ = list(self._chunks())[-1]
        order, _ = self._drawn(number, blocks, rows.device)
        cut = self.D % self.columns
        if cut:
            rows[order[-self.block :][:cut] % self.block] += 1
        return rows[: self.d].sqrt_()

    def _shared(self, x: Tensor) -> Tensor:
        return F.pad(x / self._norms.to(x.device, x.dtype), (0, self.block - self.d))

    def _shared_adjoint(self, g: Tensor) -> Tensor:
        return g[:, : self.d] / self._norms.to(g.device, g.dtype)

    def _expand_chunk(self, x: Tensor, drawn: Drawn) -> Tensor:
        order, sign = drawn
        return x.repeat(1, len(order) // self.block).index_select(1, order).mul_(sign)

    def _adjoint_chunk(self, g: Tensor, drawn: Drawn) -> Tensor:
        order, sign = drawn
        back = torch.empty_like(g).scatter_(1, order.expand(len(g), -1), g.mul_(sign))
        return back.view(len(g), -1, self.block).sum(1)


class Fastfood(Blocks):
    """One Fastfood transform over all tensors, as Li et al. 2018 use it (Le et al. 2013, arXiv 1408.3060, without S):

        P θ_d = [H G Π H B pad(θ_d)]_{1..D} / (√(m ΣG²) √(D/N))

    with N the rows before cutting: here one block of m = N = 2^⌈log₂ D⌉. H: Hadamard matrix, B: signs, Π: a
    permutation, G: a diagonal of normal numbers, or of signs, which make the columns of a whole block orthogonal. Uncut
    columns have norm 1; cut ones in expectation. Time O(D log D), memory O(D). columns changes nothing: subspaces are
    nested as they are.
    """

    name = "fastfood"
    default_diagonal: ClassVar[str] = "gaussian"

    def __init__(self, sizes: Sequence[int], d: int, seed: int, *, diagonal: str | None = None, **options: Any) -> None:
        self.diagonal = self.default_diagonal if diagonal is None else diagonal
        super().__init__(sizes, d, seed, **options)

    @property
    def block(self) -> int:
        return power_of_two(self.D)

    @property
    def bytes_a_row(self) -> int:
        return 13 if self.diagonal == "gaussian" else 10

    @property
    def reach(self) -> int:
        """2^⌈log₂ d⌉: the transform of what is zero beyond it repeats after as many entries."""
        return power_of_two(self.d)

    def problems(self) -> list[str]:
        known = f"but must be gaussian or sign{did_you_mean(str(self.diagonal), DIAGONALS)}"
        return super().problems() + [f"diagonal is {self.diagonal!r}, {known}"] * (self.diagonal not in DIAGONALS)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "diagonal": self.diagonal}

    def _diagonal(self, number: int, blocks: int) -> Tensor:
        generator = stream(self.seed, f"{self.name} {self.diagonal} G", number)
        count = blocks * self.block
        return normals(count, generator).float() if self.diagonal == "gaussian" else signs(count, generator)

    def _draw(self, number: int, blocks: int) -> Drawn:
        m, seed, name = self.block, self.seed, self.name
        order = _flat(permutations(blocks, m, stream(seed, f"{name} order", number)))
        sign = signs(blocks * m, stream(seed, f"{name} signs", number)).view(blocks, m)[:, : self.reach].contiguous()
        return sign, order, self._diagonal(number, blocks).view(blocks, m)

    @functools.cached_property
    def scale(self) -> float:
        """1 / (√(m ΣG²) √(D/N))."""
        padded = self.count * self.block
        squares = float(padded)
        if self.diagonal == "gaussian":
            squares = math.fsum(float(self._diagonal(n, b).double().square().sum()) for n, b, _ in self._chunks())
        return 1.0 / math.sqrt(self.block * squares * self.D / padded)

    def _shared(self, x: Tensor) -> Tensor:
        return F.pad(x * self.scale, (0, self.reach - self.d))

    def _shared_adjoint(self, g: Tensor) -> Tensor:
        return g[:, : self.d] * self.scale

    def _expand_chunk(self, x: Tensor, drawn: Drawn) -> Tensor:
        sign, order, diagonal = drawn
        blocks, m = diagonal.shape
        y = hadamard_(x[:, None] * sign)
        y = y[:, :, None].expand(-1, -1, m // self.reach, -1).reshape(len(x), -1)
        y = y.index_select(1, order).view(-1, blocks, m)
        return hadamard_(y.mul_(diagonal))

    def _adjoint_chunk(self, g: Tensor, drawn: Drawn) -> Tensor:
        sign, order, diagonal = drawn
        n, (blocks, m) = len(g), diagonal.shape
        y = hadamard_(g.view(n, blocks, m)).mul_(diagonal).view(n, -1)
        y = torch.empty_like(y).scatter_(1, order.expand(n, -1), y)
        if self.reach < m:
            y = y.view(n, blocks, -1, self.reach).sum(2)
        return hadamard_(y.view(n, blocks, self.reach)).mul_(sign).sum(1)


class FastfoodBlocks(Fastfood):
    """Fastfood in blocks of m = 2^⌈log₂ columns⌉ rows, each with its own B, G and Π, stacked as Le et al. 2013 do.

    The same formula, with N = K m and ΣG² over all K blocks. G of signs by default: columns are then orthonormal where
    m divides D. Time O(D log d); drawn block by block.
    """

    name = "fastfood-blocks"
    default_diagonal = "sign"

    @property
    def block(self) -> int:
        return power_of_two(self.columns)
