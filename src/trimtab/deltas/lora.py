"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.deltas.delta import Delta
from trimtab.deltas.layout import Layout
from trimtab.deltas.method import Method, positive
from trimtab.errors import UsageError
from trimtab.options import option
from trimtab.patterns import first_match


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """h = W x + (α/r) B A x, with A random, B zero and W frozen (section 4.1, equation 3).

    The defaults rank 16 and alpha 32 satisfy both recipe studies that disagree on alpha: fixed alpha 32 with
    1/r scaling (Schulman et al. 2025, "LoRA Without Regret") and alpha = 2 rank (arXiv 2405.09673).
    """

    name: ClassVar[str] = "lora"
    formula: ClassVar[str] = "h = W x + (α/r) B A x"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    shape_fields: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = option(16, "rank r of the change of each weight")
    alpha: float = option(32.0, "scale: the change is (alpha/r) B A")
    dropout: float = option(0.0, "probability of dropping an input of A while training")
    init: Literal["kaiming", "gaussian"] = option(
        "kaiming", "how A starts: uniform within 1/sqrt(in), or Gaussian with standard deviation 1/r"
    )
    rslora: bool = option(False, "scale by alpha/sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)")
    rank_pattern: Mapping[str, int] = option(factory=dict, help="rank of the modules a pattern matches, e.g. v_proj=32")
    alpha_pattern: Mapping[str, float] = option(factory=dict, help="alpha of the modules a pattern matches")

    def problems(self) -> list[str]:
        found = []
        for name, rank in [("rank", self.rank), *((f"rank_pattern[{k}]", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(rank, int) or rank < 1:
                found.append(f"{name} is {rank}, but must be a whole number of at least 1")
        for name, alpha in [("alpha", self.alpha), *((f"alpha_pattern[{k}]", v) for k, v in self.alpha_pattern.items())]:
            found += positive(name, alpha)
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout is {self.dropout}, but must be at least 0 and below 1")
        if self.init not in ("kaiming", "gaussian"):
            found.append(f"init is '{self.init}', but must be kaiming or gaussian")
        return found

    @property
    def scale(self) -> float:
        """α/r, or α/√r with rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def at(self, path: str) -> LoRA:
        if not self.patterns():
            return self
        rank = first_match(self.rank_pattern, path, self.rank)
        alpha = first_match(self.alpha_pattern, path, self.alpha)
        return dataclasses.replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def patterns(self) -> tuple[str, ...]:
        return (*self.rank_pattern, *self.alpha_pattern)

    def delta(self, layout: Layout, weight: Tensor, generator: torch.Generator) -> LoRADelta:
        smaller = min(layout.out_features, layout.in_features)
        if self.rank > smaller:
            raise UsageError(f"rank {self.rank} is above {smaller}, the smaller side of the weight")
        A = torch.empty(self.rank, layout.in_features)
        B = torch.zeros(layout.out_features, self.rank)
        if layout.lookup:
            # An embedding reads one column of A a token: A zero and B Gaussian, as in loralib and PEFT.
            A.zero_()
            B.normal_(generator=generator)
        elif self.init == "kaiming":
            bound = 1.0 / math.sqrt(layout.in_features)  # kaiming_uniform with a = √5
            A.uniform_(-bound, bound, generator=generator)
        else:
            A.normal_(0.0, 1.0 / self.rank, generator=generator)
        return LoRADelta(self, layout, A, B)


class LoRADelta(Delta):
    """(α/r) B A for one weight. A: [rank, in], B: [out, rank]."""

    method: LoRA

    def __init__(self, method: LoRA, layout: Layout, A: Tensor, B: Tensor) -> None:
        super().__init__(method, layout)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = method.scale

    def weight_change(self, weight: Tensor) -> Tensor:
        return self.scale * (self.B.float() @ self.A.float())

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.B.float(), self.A.float()

    def branch(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.method.dropout and self.training and not self.layout.lookup:
            x = F.dropout(x, self.method.dropout)
        # The branch runs in the base's dtype; casting the small factors avoids a wider copy of x.
        A, B = self.A.to(weight.dtype), self.B.to(weight.dtype)
        return self.layout.low_rank(x, B * self.scale, A)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.layout.base(x, weight, bias) + self.branch(x, weight)
