"""The contract every method keeps: a delta is a method applied to one weight.

    y = map(x; W + ΔW)

`weight_change` is the definition of ΔW; merge, analysis and the generic tests use it. `forward` computes the
same map, each method in its own fast way, and must agree with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.deltas.layout import Layout, LinearLayout
from trimtab.deltas.method import Method


class Delta(nn.Module):
    """A method applied to one weight. Everything needed to resume is in its state dict.

    method: the specification, patterns resolved. layout: how the weight is a matrix [out, in].
    """

    def __init__(self, method: Method, layout: Layout) -> None:
        super().__init__()
        self.method = method
        self.layout = layout

    def weight_change(self, weight: Tensor) -> Tensor:
        """ΔW as a matrix [out, in] in fp32. weight: the frozen weight in the module's own shape."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(B [out, r], A [r, in]) with ΔW = B A exactly, scale included; None when ΔW is not low-rank."""
        return None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted map. x and the result have the module's own shapes and dtype."""
        # Added in fp32 and rounded once: in bf16, W + ΔW rounded term by term would lose small changes.
        adapted = weight.float() + self.layout.shaped(self.weight_change(weight), weight)
        return self.layout.base(x, adapted.to(weight.dtype), bias)

    def branch(self, x: Tensor, weight: Tensor) -> Tensor:
        """What this delta adds to the module's output, for adding up several deltas."""
        return self(x, weight, None) - self.layout.base(x, weight, None)

    def after_step(self, step: int, weight: Tensor) -> None:
        """Called by the loop once per optimizer step, after it; never inside forward."""


class Sliced(Delta):
    """One method on some row ranges of a fused projection, the other rows untouched (loralib's MergedLinear).

    Each range is adapted as a linear layer of its own. parts: one delta per range; ranges: (start, stop) rows of
    the matrix [out, in], ascending and disjoint.
    """

    def __init__(self, parts: list[Delta], ranges: tuple[tuple[int, int], ...], layout: Layout) -> None:
        super().__init__(parts[0].method, layout)
        self.parts = nn.ModuleList(parts)
        self.ranges = ranges

    def _each(self, weight: Tensor) -> list[tuple[Delta, Tensor, int, int]]:
        matrix = self.layout.matrix(weight)
        return [(p, matrix[a:b], a, b) for p, (a, b) in zip(self.parts, self.ranges, strict=True)]  # type: ignore[misc]

    def weight_change(self, weight: Tensor) -> Tensor:
        rows, at = [], 0
        for part, own, start, stop in self._each(weight):
            rows += [own.new_zeros(start - at, own.shape[1], dtype=torch.float32), part.weight_change(own)]
            at = stop
        rows.append(rows[-1].new_zeros(self.layout.out_features - at, self.layout.in_features))
        return torch.cat(rows)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        pairs = [part.factors() for part in self.parts]  # type: ignore[operator]
        if any(pair is None for pair in pairs):
            return None
        B = torch.block_diag(*[pair[0] for pair in pairs])
        rows = torch.cat([torch.arange(a, b, device=B.device) for a, b in self.ranges])
        return B.new_zeros(self.layout.out_features, B.shape[1]).index_copy(0, rows, B), torch.cat([p[1] for p in pairs])

    def branch(self, x: Tensor, weight: Tensor) -> Tensor:
        pieces, at = [], 0
        for part, own, start, stop in self._each(weight):
            pieces += [x.new_zeros(*x.shape[:-1], start - at), part.branch(x, own)]
            at = stop
        pieces.append(x.new_zeros(*x.shape[:-1], self.layout.out_features - at))
        return torch.cat(pieces, dim=-1)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.layout.base(x, weight, bias) + self.branch(x, weight)

    def after_step(self, step: int, weight: Tensor) -> None:
        for part, own, _, _ in self._each(weight):
            part.after_step(step, own)


def slice_layout(layout: Layout, start: int, stop: int) -> Layout:
    """The layout of rows start..stop of a fused projection: a linear layer of its own."""
    return LinearLayout(stop - start, layout.in_features)
