"""θ − θ0 for the tensors of a model: P θ_d cut into them and, for SAID, each times the λ of its layer.

DID (Li et al. 2018, arXiv 1804.08838) and SAID (Aghajanyan et al. 2020, arXiv 2012.13255, section 3):

    DID   θ_i = θ0_i + (P θ_d)_i
    SAID  θ_i = θ0_i + λ_i (P θ_{d−m})_i       m layers, whose λ come out of the budget d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError, did_you_mean
from trimtab.subspace.projection import Projection, make_projection

MODES = ("did", "said")


class Offsets(nn.Module):
    """What is trained in a subspace: θ_d [d], zeros at the start, and for SAID λ [m], ones, beside θ_d [d − m].

    sizes: entries of each tensor, in order. groups: for SAID the layer of each tensor; None for DID. d: how many
    numbers are trained in all. projection, seed, options: see `make_projection`. P is drawn when it is first used.
    Raises UsageError for a d below 1, above D or, for SAID, not above m.
    """

    theta_d: nn.Parameter
    lambdas: nn.Parameter | None

    def __init__(
        self, sizes: Sequence[int], groups: Sequence[int] | None, d: int, projection: str, seed: int, **options: Any
    ) -> None:
        super().__init__()
        D, m = sum(sizes), len(set(groups)) if groups is not None else 0
        if not 1 <= d <= D:
            raise UsageError(
                f"d is {d}, but must be from 1 to {D:,}, the number of entries of the {len(sizes)} tensors"
            )
        if d <= m:
            raise UsageError(
                f"d is {d}, but SAID spends {m} of it on the λ of {m} layers: take d above {m}, or mode did"
            )
        self.sizes, self.groups = tuple(sizes), None if groups is None else tuple(groups)
        self._drawing = (projection, d - m, seed, options)
        self._projection: Projection | None = None
        self.theta_d = nn.Parameter(torch.zeros(d - m))
        # With θ_d = 0 as well, λ = 0 would leave both without a gradient.
        self.lambdas = nn.Parameter(torch.ones(m)) if m else None

    @property
    def projection(self) -> Projection:
        """P [D, d], or [D, d − m] for SAID."""
        if self._projection is None:
            name, columns, seed, options = self._drawing
            self._projection = make_projection(name, self.sizes, columns, seed, **options)
        return self._projection

    def trained(self) -> list[nn.Parameter]:
        """The d numbers that are trained: θ_d and, for SAID, λ."""
        return [self.theta_d] if self.lambdas is None else [self.theta_d, self.lambdas]

    def offsets(self, theta_d: Tensor | None = None, lambdas: Tensor | None = None) -> list[Tensor]:
        """θ_i − θ0_i of each tensor, flat, in fp32 (fp64 where θ_d is). A function of what is given in the place of
        the module's own θ_d and λ, for torch.func."""
        flat = self.flat(self.theta_d if theta_d is None else theta_d)
        return self.cut(flat, self.lambdas if lambdas is None else lambdas)

    def flat(self, theta_d: Tensor) -> Tensor:
        """P θ_d [D], in fp32 (fp64 where θ_d is)."""
        with torch.autocast(theta_d.device.type, enabled=False):
            return self.projection.expand(theta_d if theta_d.dtype == torch.float64 else theta_d.float())

    def cut(self, flat: Tensor, lambdas: Tensor | None) -> list[Tensor]:
        """P θ_d [D] in tensors, each times the λ of its layer where there are any."""
        parts = list(flat.split_with_sizes(self.sizes))
        if lambdas is None or self.groups is None:
            return parts
        scales = lambdas.to(flat.dtype).unbind()
        return [scales[group] * part for group, part in zip(self.groups, parts, strict=True)]


def groups_of(mode: str, layers: str | None, by_layer: Sequence[int]) -> Sequence[int] | None:
    """The layer of each tensor as SAID counts them; None for DID. layers: None, or "tensor" for one λ a tensor.

    UsageError for an unknown mode or kind of layers.
    """
    if mode not in MODES:
        raise UsageError(f"mode is '{mode}', but must be did or said{did_you_mean(mode, MODES)}")
    if layers not in (None, "tensor"):
        raise UsageError(f"layers is '{layers}', but must be 'tensor' (one λ a tensor) or None (one a block)")
    if mode == "did":
        return None
    return range(len(by_layer)) if layers == "tensor" else by_layer
