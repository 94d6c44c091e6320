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
from torch.utils.hooks import RemovableHandle


def even_rows_for_head(model: nn.Module) -> RemovableHandle | None:
    """Give the model's output head its inputs with rows that follow one another, until the handle is removed.

    None where there is no linear head to be found.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head.register_forward_pre_hook(_even_rows) if isinstance(head, nn.Linear) else None


def _even_rows(head: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x = given[0] if given else None
    if x is None or x.dim() != 3 or x.stride(0) == x.stride(1) * x.shape[1]:
        return None
    return x.clone(memory_format=torch.contiguous_format), *given[1:]
