"""The precision in which sums and normalisers are kept."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
