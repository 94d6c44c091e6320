"""What users call the dtypes that models are kept and computed in. Imports no torch before it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""torch's names, and the short ones."""
FULL = {known: full for full, short in DTYPES.items() for known in (full, short)}
"""torch's name of each of them."""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype with this name, torch's own or the short one. UsageError for any other."""
    import torch

    if name not in FULL:
        raise UsageError(f"dtype is '{name}', but must be one of {', '.join(DTYPES)}{did_you_mean(name, FULL)}")
    found = getattr(torch, FULL[name])
    assert isinstance(found, torch.dtype)
    return found
