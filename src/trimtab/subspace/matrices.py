"""Projections that are kept as matrices: dense, and sparse with a density of 1 over a square root."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.subspace.draws import Drawn, Kept, chosen, normals, signs, stream
from trimtab.subspace.linear import Projection

MATRIX_BYTES = 8 * 2**30
"""A matrix that takes more is refused."""


class KeptMatrix(Projection):
    """P as numbers in memory, on every device that it is used on."""

    def problems(self) -> list[str]:
        found = super().problems()
        size = 0 if found else self.d * self.column_bytes(self.sizes)
        if size > MATRIX_BYTES:
            found.append(
                f"its matrix of {self.D:,} × {self.d:,} would take {size / 2**30:,.1f} GiB, above the limit of "
                f"{MATRIX_BYTES / 2**30:g}: take uni or fastfood-blocks, which keep none"
            )
        return found

    @classmethod
    def most(cls, sizes: Sequence[int]) -> int:
        return min(sum(sizes), int(MATRIX_BYTES / cls.column_bytes(sizes)))

    @classmethod
    @abc.abstractmethod
    def column_bytes(cls, sizes: Sequence[int]) -> float:
        """About how many bytes a column of the matrix takes."""

    @abc.abstractmethod
    def _draw(self) -> Drawn:
        """The matrix."""

    @functools.cached_property
    def _kept(self) -> Kept:
        return Kept()

    def _drawn(self, device: torch.device) -> Drawn:
        return self._kept.get("matrix", device, self._draw)


class Dense(KeptMatrix):
    """Independent normal entries, each column divided by its norm over all tensors. Time and memory O(d D)."""

    name = "dense"

    @classmethod
    def column_bytes(cls, sizes: Sequence[int]) -> float:
        return 4 * sum(sizes)

    def _draw(self) -> Drawn:
        """Pᵀ [d, D], fp32."""
        matrix = torch.empty(self.d, self.D)
        for j, row in enumerate(matrix):
            entries = normals(self.D, stream(self.seed, "dense", j))
            row.copy_(entries / torch.linalg.vector_norm(entries))
        return (matrix,)

    def _expand(self, x: Tensor) -> Tensor:
        return x @ self._drawn(x.device)[0].to(x.dtype)

    def _adjoint(self, g: Tensor) -> Tensor:
        return g @ self._drawn(g.device)[0].to(g.dtype).T


class Sparse(KeptMatrix):
    """Drawn tensor by tensor, as Li et al.'s released code does: density 1/√n for a tensor of n entries.

    An entry is ± √(1/density) (Li, Hastie and Church 2006, "Very Sparse Random Projections"), so that a tensor's share
    of a column is that of its size; then each column is divided by its norm over all tensors. Time and memory O(d Σ√n):
    the place and value of each entry are kept, since drawing takes far longer than the product. On a GPU the sums over
    entries are in no fixed order.
    """

    name = "sparse"
    bytes_an_entry: ClassVar[int] = 20

    @staticmethod
    def parts(sizes: Sequence[int]) -> tuple[int, ...]:
        """Entries of each part that has a density of its own."""
        return tuple(sizes)

    @classmethod
    def column_bytes(cls, sizes: Sequence[int]) -> float:
        return cls.bytes_an_entry * sum(map(math.sqrt, cls.parts(sizes)))

    def _draw(self) -> Drawn:
        """Rows and columns (int64) and values (fp32) of the entries."""
        rows, columns, values, first = [], [], [], 0
        for number, size in enumerate(self.parts(self.sizes)):
            generator = stream(self.seed, self.name, number)
            places = chosen(size * self.columns, size**-0.5, generator)
            sign = signs(len(places), generator)
            within = places < size * self.d  # column after column, so that the first d of m come first
            places = places[within]
            columns.append(places // size)
            rows.append(places % size + first)
            values.append(sign[within] * float(size) ** 0.25)
            first += size
        return self._normalised(torch.cat(rows), torch.cat(columns), torch.cat(values).double())

    def _normalised(self, rows: Tensor, columns: Tensor, values: Tensor) -> Drawn:
        """With columns of norm 1; a column without entries is given one, in a random row."""
        squares = torch.zeros(self.d, dtype=torch.float64).index_add_(0, columns, values.square())
        empty = (squares == 0).nonzero()[:, 0]
        if len(empty):
            spare = torch.randint(self.D, (self.columns,), generator=stream(self.seed, f"{self.name} spare"))
            rows, columns = torch.cat([rows, spare[empty]]), torch.cat([columns, empty])
            values, squares[empty] = torch.cat([values, torch.ones(len(empty))]), 1.0
        values = (values / squares.sqrt()[columns]).float()
        order = rows.argsort(stable=True)  # row after row both products read and write in order
        return rows[order], columns[order], values[order]

    def _expand(self, x: Tensor) -> Tensor:
        rows, columns, values = self._drawn(x.device)
        out = x.new_zeros(len(x), self.D)
        for each, result in zip(x, out, strict=True):  # in one dimension it is twice as fast
            result.scatter_add_(0, rows, each.index_select(0, columns).mul_(values))
        return out

    def _adjoint(self, g: Tensor) -> Tensor:
        rows, columns, values = self._drawn(g.device)
        out = g.new_zeros(len(g), self.d)
        for each, result in zip(g, out, strict=True):
            result.scatter_add_(0, columns, each.index_select(0, rows).mul_(values))
        return out


class SparseGlobal(Sparse):
    """One density for all tensors, 1/√D, as Li et al. 2018 write: O(d √D)."""

    name = "sparse-global"

    @staticmethod
    def parts(sizes: Sequence[int]) -> tuple[int, ...]:
        return (sum(sizes),)
