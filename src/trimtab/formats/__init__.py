"""Adapters on disk. One file per format; `FORMATS` names them."""

from __future__ import annotations

FORMATS: dict[str, str] = {
    "peft": "adapter_config.json and adapter_model.safetensors, as huggingface/peft writes and reads them",
}
