"""What autograd keeps for backward, counted in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(compute: Callable[[], Any], besides: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that `compute` saves for backward, each storage once, those of `besides` left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    found: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # an address freed meanwhile could be another tensor's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()
    del result
    return sum(found.values())
