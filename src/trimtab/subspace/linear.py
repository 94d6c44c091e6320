"""What a projection is: θ = P θ_d over one flat parameter vector, and its adjoint, the gradient of θ_d.

Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv 1804.08838, section 2: P [D, d] is
random and fixed, its columns have norm 1 or nearly so, and θ_d [d] is trained.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.errors import UsageError, problems_to_error
from trimtab.ops.precision import wide
from trimtab.subspace.draws import GENERATOR

CACHE_BYTES = 512 * 2**20
"""What a projection draws is kept up to this size, and beyond it drawn again for every product."""


class Projection(abc.ABC):
    """P [D, d], drawn from a seed, of which no more is saved than `options()`.

    sizes: entries of each tensor, in order; D is their sum. columns: m ≥ d, for P to be the first d columns of one
    matrix of m, so that subspaces of one seed and m are nested; None: m = d. cache_bytes: up to which size what is
    drawn is kept, where it need not be.
    """

    name: ClassVar[str]

    def __init__(
        self, sizes: Sequence[int], d: int, seed: int, *, columns: int | None = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.sizes, self.D, self.d, self.seed = tuple(sizes), sum(sizes), d, seed
        self.columns, self.cache_bytes = d if columns is None else columns, cache_bytes
        problems_to_error(self.problems(), f"projection {self.name}")

    @classmethod
    def most(cls, sizes: Sequence[int]) -> int:
        """The largest d that there is room for."""
        return sum(sizes)

    def problems(self) -> list[str]:
        """What is wrong with the values given."""
        if not self.sizes or min(self.sizes) < 1:
            return [f"sizes are {list(self.sizes)[:8]}, but must be numbers of entries, each at least 1"]
        given = {"d": self.d, "columns": self.columns, "seed": self.seed}
        found = [f"{key} is {n!r}, but must be a whole number" for key, n in given.items() if not isinstance(n, int)]
        if found:
            return found
        if not 1 <= self.d <= self.D:
            found.append(f"d is {self.d}, but must be from 1 to {self.D:,}, the number of entries")
        elif not self.d <= self.columns <= self.D:
            found.append(
                f"columns is {self.columns}, but must be from d = {self.d} to {self.D:,}, the number of entries"
            )
        return found

    def options(self) -> dict[str, Any]:
        """Plain values that `make_projection(**options)` makes the same P of."""
        return {
            "name": self.name,
            "sizes": list(self.sizes),
            "d": self.d,
            "seed": self.seed,
            "columns": self.columns,
            "generator": GENERATOR,
        }

    def expand(self, theta_d: Tensor) -> Tensor:
        """P θ_d. theta_d: [..., d]; gives [..., D], in its dtype and on its device. Its gradient is `adjoint`'s."""
        return self._applied(theta_d, False)

    def adjoint(self, g: Tensor) -> Tensor:
        """Pᵀ g, exactly. g: [..., D]; gives [..., d], in its dtype and on its device. Its gradient is `expand`'s."""
        return self._applied(g, True)

    def _applied(self, x: Tensor, transposed: bool) -> Tensor:
        length, what = (self.D, "D") if transposed else (self.d, "d")
        if x.shape[-1:] != (length,) or not x.dtype.is_floating_point:
            raise UsageError(
                f"projection {self.name}: the input is {list(x.shape)} of {x.dtype}, but must be real with a last "
                f"dimension of {what} = {length:,}"
            )
        y: Tensor = _Applied.apply(x, self, transposed)  # type: ignore[no-untyped-call]
        return y

    @abc.abstractmethod
    def _expand(self, x: Tensor) -> Tensor:
        """P x. x: [n, d], in fp32 or fp64."""

    @abc.abstractmethod
    def _adjoint(self, g: Tensor) -> Tensor:
        """Pᵀ g. g: [n, D], in fp32 or fp64."""


class _Applied(torch.autograd.Function):
    """P x or Pᵀ x. Each is the other's gradient, to any order."""

    @staticmethod
    def forward(x: Tensor, projection: Projection, transposed: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(wide(x.dtype))
        with torch.autocast(x.device.type, enabled=False):
            y = projection._adjoint(rows) if transposed else projection._expand(rows)
        return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.projection, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.projection._applied(grads[0], not ctx.transposed), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, projection: Projection, transposed: bool
    ) -> tuple[Tensor, int]:
        return projection._applied(x.movedim(in_dims[0], 0), transposed), 0
