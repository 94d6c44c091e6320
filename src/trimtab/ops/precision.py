"""The precision in which sums and normalisers are kept, and who chooses it."""

from __future__ import annotations

import functools

import torch


def autocasts(device: torch.device) -> bool:
    """Whether operations on a device choose their dtypes by themselves now."""
    kind = device.type
    return _autocast_exists(kind) and torch.is_autocast_enabled(kind)


_autocast_exists = functools.cache(torch.amp.is_autocast_available)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
