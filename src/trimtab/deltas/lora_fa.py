"""LoRA-FA: LoRA with A frozen (Zhang et al. 2023, arXiv 2308.03303)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.deltas.layout import Layout
from trimtab.deltas.lora import LoRA, LoRADelta


@dataclasses.dataclass(frozen=True)
class LoRAFA(LoRA):
    """h = W x + (α/r) B A x with A random and frozen, and B alone trained, from zero.

    The change of W stays in the row space of A. No gradient needs x: in linear layers x Aᵀ is kept for backward, r
    numbers a token. An embedding's A is Gaussian with standard deviation 1/r here, as a zero one would learn nothing.
    PEFT's optimizer of this name also turns B's gradient by (A Aᵀ)⁻¹; this is the method as first published, with the
    optimizer of all others. The map is LoRA's, and so is the file.
    """

    name: ClassVar[str] = "lora-fa"
    title: ClassVar[str] = "LoRA-FA"
    formula: ClassVar[str] = "h = W x + (α/r) B A x, with A frozen"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2308.03303"

    def start(self, layout: Layout, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        A, B = super().start(layout, generator)
        return (A.normal_(0.0, 1.0 / self.rank, generator=generator), B.zero_()) if layout.lookup else (A, B)

    def delta(self, layout: Layout, weight: Tensor, generator: torch.Generator) -> LoRAFADelta:
        return LoRAFADelta(self, layout, *self.start(layout, generator))


class LoRAFADelta(LoRADelta):
    """LoRA's A, a buffer, and B."""

    A: Tensor  # type: ignore[assignment]

    def __init__(self, method: LoRAFA, layout: Layout, A: Tensor, B: Tensor) -> None:
        super().__init__(method, layout, A, B)
        del self._parameters["A"]
        self._buffers["A"] = A

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B
