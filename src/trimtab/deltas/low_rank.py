"""What deltas that are a product of two thin matrices have in common: all but what A and B are made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.deltas.delta import Delta, wide
from trimtab.deltas.layout import Layout
from trimtab.ops.lora_linear import lora_linear


class LowRankDelta(Delta):
    """ΔW = scale · B A, with A [r, in] and B [out, r] made of the parameters by `pair`.

    exact: whether the branch is computed in the factors' dtype where the base has fewer bits, which takes a copy of
    the input. undropped: whether a part of it reads the input without dropout.
    """

    scale: float = 1.0
    exact: bool = False
    undropped: bool = False

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B), without the scale; gradients go through it."""
        raise NotImplementedError

    @property
    def dropout(self) -> float:
        """The probability of dropping an input of A now: none in evaluation."""
        return float(getattr(self.method, "dropout", 0.0)) if self.training else 0.0

    def weight_change(self, weight: Tensor) -> Tensor:
        A, B = self.pair()
        return self.scale * (wide(B) @ wide(A))

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.pair()
        return self.scale * wide(B), wide(A)

    def branch(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        A, B = self.pair()
        return self.read(self.dropped(x), weight, A, B * self.scale)

    def dropped(self, x: Tensor) -> Tensor:
        """What A reads of x."""
        return F.dropout(x, self.dropout) if self.dropout and not self.layout.lookup else x

    def read(self, x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B A x, in the dtype that this delta's branch is computed in."""
        if self.exact and not self.layout.lookup:
            x = wide(x)
        dtype = B.dtype if self.exact else weight.dtype  # casting the small factors avoids a wider copy of x
        return self.layout.low_rank(x, B.to(dtype), A.to(dtype))

    @property
    def fused(self) -> bool:
        """Whether the base and the branch are computed as one step of autograd."""
        return self.layout.linear and not (self.exact or (self.undropped and self.dropout))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.fused:
            A, B = self.pair()
            return lora_linear(x, self.layout.matrix(weight), bias, A, B, self.scale, self.dropout)
        y = self.layout.base(x, weight, bias)
        return (y + self.branch(x, weight, bias)).to(y.dtype)


def fresh_pair(rank: int, layout: Layout, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [r, in] uniform within 1/√in (Kaiming's bound with a = √5) and B [out, r] zero, as loralib and PEFT start.

    An embedding reads one column of A a token: there A is zero, and B Gaussian.
    """
    A, B = torch.empty(rank, layout.in_features), torch.zeros(layout.out_features, rank)
    if layout.lookup:
        return A.zero_(), B.normal_(generator=generator)
    bound = 1.0 / math.sqrt(layout.in_features)
    return A.uniform_(-bound, bound, generator=generator), B
