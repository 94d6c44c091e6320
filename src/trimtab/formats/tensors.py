"""The file that an adapter's tensors are in, with errors a user can act on. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from trimtab.errors import FormatError, UsageError
from trimtab.files import disk_errors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU. FormatError when it is truncated or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise FormatError(
            f"{path} is not a whole safetensors file ({error}): it is truncated or of another format"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. A full disk and the like are raised as the OSError they are."""
    from safetensors.torch import save_file

    with disk_errors(path):
        save_file(dict(tensors), path, metadata={"format": "pt"})
