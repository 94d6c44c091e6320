"""Soft prompts in PEFT's folder: one tensor, the virtual tokens, and a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import trimtab
from trimtab.adapt.adapter import own_state
from trimtab.adapt.fingerprint import fingerprint
from trimtab.adapt.prompt_trial import fitting_sizes
from trimtab.adapt.prompts import Prompt, PromptAdapter, backbone_of, make_prompt
from trimtab.errors import FormatError
from trimtab.formats.peft_write import WEIGHTS, base_name, digest, provenance, write_folder
from trimtab.options import to_mapping

TOKENS = "prompt_embeddings"


def save_prompt(adapter: PromptAdapter, path: str | Path) -> Path:
    """Write a soft prompt as PEFT does: the virtual tokens, without the network that made them, if any.

    Raises StorageError as `save_adapter` does.
    """
    own_state(adapter)
    config = {
        **adapter.prompt.config.to_dict(),
        "base_model_name_or_path": base_name(adapter.model) or adapter.provenance.get("base_model"),
        "revision": getattr(adapter.model, "_trimtab_revision", None),
        "inference_mode": True,
    }
    own = {
        "trimtab": trimtab.__version__,
        "config_sha256": digest(config),
        "method": adapter.method.options(),
        "placement": to_mapping(adapter.placement),
        "provenance": provenance(adapter),
        "base": fingerprint(adapter),
    }
    with torch.no_grad():
        return write_folder(path, config, {TOKENS: adapter.prompt.tokens()}, own)


def stored_prompt(
    adapter: PromptAdapter, tensors: Mapping[str, Tensor], folder: Path
) -> tuple[str, torch.nn.Module, Prompt]:
    """(path of the backbone, the backbone, the prompt) of a PEFT folder. FormatError when they do not fit."""
    path, backbone = backbone_of(adapter.model, adapter.method)
    if set(tensors) != {TOKENS}:
        foreign = next((key for key in tensors if key != TOKENS), "nothing")
        raise FormatError(f"{folder / WEIGHTS} must hold '{TOKENS}' alone, but holds {foreign}")
    sizes = fitting_sizes(adapter.model, backbone, adapter.method)
    words: torch.nn.Module = adapter.model.get_input_embeddings()  # type: ignore[operator]
    prompt = make_prompt(adapter.method, sizes, words, trained=False)
    own, stored = prompt.tokens(), tensors[TOKENS]
    if own.shape != stored.shape:
        raise FormatError(
            f"{folder} does not fit this model: its virtual tokens are {[*stored.shape]}, and here {[*own.shape]}"
        )
    own.data = stored.clone()
    return path, backbone, prompt
