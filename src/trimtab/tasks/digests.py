"""What tells one model, adapter, file, data set or prompt from another: 16 hexadecimal digits of SHA-256 each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from trimtab.data.encode import Example

SAMPLED = 32
"""So many values of each weight are looked at, evenly spaced: all of a large model would take many seconds."""


def model_digest(model: nn.Module) -> str:
    """Of some values of each weight, as they are: another dtype is another model."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLED)].tolist()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype} {sample}\n".encode())
    return digest.hexdigest()[:16]


def config_digest(config: PreTrainedConfig) -> str:
    """Of a model's configuration: its architecture, activations, dropout; not its name or who wrote it."""
    told = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    return text_digest(json.dumps(told, sort_keys=True, default=str))


def examples_digest(examples: Iterable[Example]) -> str:
    """Of examples as tokens, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.content())
    return digest.hexdigest()[:16]


def adapter_digest(folder: Path) -> str:
    """Of an adapter's weights and configuration, whatever its folder is called."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def text_digest(text: str) -> str:
    """Of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
