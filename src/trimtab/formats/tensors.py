"""The two kinds of file adapters are made of, with errors a user can act on. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. FormatError with line and column when it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold keys and values, but holds a {type(content).__name__}")
    return content
