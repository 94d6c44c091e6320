"""A convolution and the 2×2 max-pooling behind it as one product, for images that need no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def pooled_convolution(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """max_pool2d(conv2d(images, weight, bias), 2), without a gradient of the images.

    images: [batch, channels, height, width]; weight: [out, channels, k, k]; bias: [out]. Each place of the pooled map
    sees one patch of k+1 by k+1 pixels, and the four places pooled there are one kernel in four positions on it. So the
    patches are laid out once and multiplied by 4 · out rows; the gradient of the weight is a product with them too.
    Where channels are few, that takes about half of what the two calls of the library take on a CPU.
    """
    out, channels, k, _ = weight.shape
    # patches: [channels (k+1)², batch · height · width of the pooled map]
    windows = images.detach().unfold(2, k + 1, 2).unfold(3, k + 1, 2)
    batch, _, high, wide = windows.shape[:4]
    patches = windows.permute(1, 4, 5, 0, 2, 3).reshape(channels * (k + 1) ** 2, -1)
    shifted = [functional.pad(weight, (right, 1 - right, down, 1 - down)) for down in (0, 1) for right in (0, 1)]
    four = torch.cat(shifted).reshape(4 * out, -1) @ patches
    largest: Tensor = _LargestOfFour.apply(four.view(4, out, -1))  # type: ignore[no-untyped-call]
    return (largest + bias[:, None]).view(out, batch, high, wide).transpose(0, 1)


class _LargestOfFour(torch.autograd.Function):
    """The largest over the first dimension, which has 4 entries; the gradient goes to the first that is the largest."""

    @staticmethod
    def forward(ctx: Any, four: Tensor) -> Tensor:
        largest = torch.maximum(torch.maximum(four[0], four[1]), torch.maximum(four[2], four[3]))
        ctx.save_for_backward(four, largest)
        return largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        four, largest = ctx.saved_tensors
        shares, left = torch.empty_like(four), gradient
        for entry, share in zip(four[:3], shares[:3], strict=True):
            torch.eq(entry, largest, out=share).mul_(left)  # as numbers: selecting by truth values is far slower
            left = left - share
        shares[3] = left
        return shares
