"""Running a model without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trimtab.adapt.module import modes_kept


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within: evaluation mode, no gradients. After: every module's own training mode is as before."""
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is: the device its inputs go to."""
    return next(model.parameters()).device
