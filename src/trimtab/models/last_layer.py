"""The last layer's feed-forward at the positions that are read, where the loss reads few of them.

Nothing looks at the last hidden state but the loss, at the positions that predict a target, and a feed-forward layer
works on each position by itself. In the layers below, later attention reads every position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FEED_FORWARD = "mlp"
"""What transformers' decoder layers call it."""
FEW = 0.7
"""The part of the positions up to which picking them out is worth it."""


def last_feed_forward(backbone: nn.Module) -> nn.Module | None:
    """The feed-forward of the last of the backbone's layers; None where it has none of the name."""
    stacks = [module for module in backbone.children() if isinstance(module, nn.ModuleList) and len(module)]
    layer = max(stacks, key=len)[-1] if stacks else None
    found = getattr(layer, FEED_FORWARD, None)
    return found if isinstance(found, nn.Module) else None


def recomputes(backbone: nn.Module) -> bool:
    """Whether layers run again in backward, by gradient checkpointing."""
    return backbone.training and any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())


@contextmanager
def at_positions(module: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within the block the module is computed at some positions of the flattened tokens and gives zeros elsewhere.

    module: maps [rows, length, d] to [rows, length, d'], each position by itself. positions: [n] int64, no two equal.
    """
    shapes: list[torch.Size] = []

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(args[0].shape[:-1])
        return args[0].flatten(0, -2)[positions].unsqueeze(0), *args[1:]

    def put_back(_: nn.Module, args: Any, y: Tensor) -> Tensor:
        shape = shapes.pop()
        everywhere = y.new_zeros(shape.numel(), y.shape[-1])
        return everywhere.index_copy(0, positions, y.squeeze(0)).view(*shape, -1)

    hooks = [module.register_forward_pre_hook(pick), module.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
