"""How the weight of each kind of module is a matrix [out, in], and how a low-rank pair acts on its input.

Methods are written once against the matrix; what differs between a linear layer, a convolution and an
embedding is said here and nowhere else. Layouts are plain frozen values: they hold no tensors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import TRIAL_FAILURES, ran_out_of_memory

OF_LINEAR = {"training", "in_features", "out_features", "copies"}
"""Attributes of a linear layer, and of an adapted one."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A weight seen as a matrix [out, in]. Base of the layouts below.

    bias: whether the module adds one to its output.
    """

    out_features: int
    in_features: int
    bias: bool = dataclasses.field(default=False, kw_only=True)

    kind = "linear"
    lookup = False
    """Whether the input holds row numbers (an embedding) and not features."""
    linear = False
    """Whether the map is x Wᵀ + b with W the matrix."""

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [out, in], a view where the memory allows."""
        return weight

    def shaped(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrix`: [out, in] in the shape of the weight `like`."""
        return matrix

    def along(self, channels: Tensor) -> Tensor:
        """A number for each channel, in the shape that multiplies the module's input or output."""
        return channels

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the unadapted module computes."""
        return F.linear(x, weight, bias)

    def low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        """The change of the output for ΔW = B A, never forming ΔW. B: [out, r], A: [r, in]."""
        return F.linear(F.linear(x, A), B)


class LinearLayout(Layout):
    """nn.Linear: the weight is [out, in] itself."""

    linear = True


class Conv1DLayout(Layout):
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight as [in, out]."""

    kind = "conv1d-transposed"
    linear = True

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def shaped(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.T

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.T, bias)


@dataclasses.dataclass(frozen=True)
class EmbeddingLayout(Layout):
    """nn.Embedding: the weight is [vocabulary, dim], so out = dim and in = vocabulary.

    scale: what the module multiplies its output by (1 for nn.Embedding; √dim in some decoders). scale_rounded:
    whether the module rounds that factor to its weight's dtype first.
    """

    padding_idx: int | None = None
    scale: float = 1.0
    scale_rounded: bool = False
    kind = "embedding"
    lookup = True

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def shaped(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.T

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._scaled(F.embedding(x, weight, padding_idx=self.padding_idx))

    def low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        return self._scaled(F.linear(F.embedding(x, A.T, padding_idx=self.padding_idx), B))

    def _scaled(self, y: Tensor) -> Tensor:
        if self.scale == 1.0:
            return y
        return y * (torch.tensor(self.scale, dtype=y.dtype, device=y.device) if self.scale_rounded else self.scale)


@dataclasses.dataclass(frozen=True)
class ConvLayout(Layout):
    """nn.Conv1d/2d/3d: the weight [out, in/groups, *kernel] flattened to [out, in/groups · ∏kernel]."""

    dimensions: int = 2
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    reversed_padding: tuple[int, ...] = ()
    """What nn.Conv hands to F.pad when padding_mode is not zeros."""

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"conv{self.dimensions}d"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def shaped(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.reshape(like.shape)

    def along(self, channels: Tensor) -> Tensor:
        return channels.reshape(-1, *[1] * self.dimensions)

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.reversed_padding, mode=self.padding_mode), 0
        return conv(x, weight, bias, self.stride, padding, self.dilation, self.groups)  # type: ignore[no-any-return]

    def low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        # A: [r, in/groups · ∏kernel]. Each group sees its own slice of the input, so A is repeated a group.
        rank = A.shape[0]
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        kernels = A.reshape(rank, -1, *self.kernel)
        h = self.base(x, kernels.repeat(self.groups, *[1] * (self.dimensions + 1)), None)
        return conv(h, B.reshape(*B.shape, *[1] * self.dimensions), groups=self.groups)  # type: ignore[no-any-return]


def slice_layout(layout: Layout, start: int, stop: int) -> Layout:
    """The layout of rows start..stop of a fused projection: a linear layer of its own."""
    return LinearLayout(stop - start, layout.in_features, bias=layout.bias)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or of what it was before it was adapted."""
    cls = type(module)
    while hasattr(cls, "original_class"):
        cls = cls.original_class
    return cls


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module's weight, or None when trimtab cannot adapt that kind of module exactly.

    A subclass with a forward of its own computes something else than its parent, so it is not taken for it. Excepted
    are scaled embeddings, whose factor is known, and linear layers that give what torch's gives.
    """
    from transformers.pytorch_utils import Conv1D

    forward = original_class(module).forward
    if isinstance(module, nn.Linear) and (forward is nn.Linear.forward or _gives_what_torchs_does(module)):
        return LinearLayout(module.out_features, module.in_features, bias=module.bias is not None)
    if isinstance(module, Conv1D) and forward is Conv1D.forward:
        return Conv1DLayout(module.weight.shape[1], module.weight.shape[0], bias=True)
    if isinstance(module, nn.Embedding) and module.max_norm is None and not module.sparse:
        return _embedding_layout(module)
    for dimensions, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1):
        if isinstance(module, kind) and forward is kind.forward:
            return _conv_layout(module, dimensions)
    return None


@torch.no_grad()
def _gives_what_torchs_does(module: nn.Linear) -> bool:
    """Whether a linear layer with a forward of its own, and nothing else of its own, computes x Wᵀ + b."""
    weight, public = module.weight, {name for name in vars(module) if not name.startswith("_")}
    if public - OF_LINEAR or module._buffers or not weight.is_floating_point():
        return False  # what is quantised keeps how
    x = torch.ones(2, module.in_features, dtype=weight.dtype, device=weight.device)
    x[1, ::2] = -0.5
    plain, few = F.linear(x, weight, module.bias), 16 * torch.finfo(weight.dtype).eps
    try:
        y = original_class(module).forward(module, x)
        alike = isinstance(y, Tensor) and y.shape == plain.shape and y.dtype == plain.dtype
        return alike and torch.allclose(y, plain, rtol=few, atol=few * float(plain.abs().max()))
    except TRIAL_FAILURES as error:
        if ran_out_of_memory(error):
            raise
        return False


def _embedding_layout(module: nn.Embedding) -> Layout | None:
    own, sizes = original_class(module), (module.embedding_dim, module.num_embeddings, module.padding_idx)
    if own.forward is nn.Embedding.forward:
        return EmbeddingLayout(*sizes)
    factor: Any = getattr(module, "embed_scale", None)
    if "ScaledWordEmbedding" not in own.__name__ or factor is None:
        return None
    return EmbeddingLayout(*sizes, float(factor), isinstance(factor, Tensor))


def _conv_layout(module: Any, dimensions: int) -> Layout:
    padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
    return ConvLayout(
        module.out_channels,
        module.weight[0].numel(),
        dimensions,
        tuple(module.kernel_size),
        tuple(module.stride),
        padding,
        tuple(module.dilation),
        module.groups,
        module.padding_mode,
        tuple(module._reversed_padding_repeated_twice),
        bias=module.bias is not None,
    )
