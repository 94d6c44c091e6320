"""Slices of hidden states in a frozen output head.

torch's linear map takes an input [batch, tokens, features] as one matrix where its rows follow one another evenly or
the weight wants a gradient. Otherwise it makes a batch of products, and for that a copy of the whole weight. The last
token of each sequence, which is all that `generate` gives the head of a model after a prompt, is such a slice: with the
base frozen, a prompt would cost a copy of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.adapt.select import output_head


def even_rows_for_head(model: nn.Module) -> None:
    """Give the model's output head, where it has a linear one, its inputs with rows that follow one another."""
    head = output_head(model)
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(_even_rows)


def release_head(model: nn.Module) -> None:
    """Undo `even_rows_for_head`, wherever the head has gone since."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _even_rows]:
            del hooks[key]


def is_plain(head: nn.Module) -> bool:
    """Whether the head computes what its class does: no forward of its own, and no hooks but `even_rows_for_head`'s."""
    kinds = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
    hooks = [hook for kind in kinds for hook in getattr(head, kind).values()]
    return "forward" not in vars(head) and all(hook is _even_rows for hook in hooks)


def _even_rows(head: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x: Any = given[0] if given else None
    if x is None or x.dim() != 3 or x.stride(0) == x.stride(1) * x.shape[1]:
        return None
    return x.clone(memory_format=torch.contiguous_format), *given[1:]
