"""Checkpoints: what a run needs to go on as if it had never stopped, written whole or not at all, never pickled."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.adapt.adapter import Adapter
from trimtab.errors import FormatError
from trimtab.files import whole_folder
from trimtab.formats.tensors import read_json, read_tensors

TENSORS, FIGURES = "state.safetensors", "state.json"


@dataclasses.dataclass
class Progress:
    """How far a run is. Counters are since its first step; loss_sum is in nats, the other losses a supervised token."""

    step: int = 0
    real_tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    eval_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0

    def add(self, step: int, real_tokens: int, supervised_tokens: int, loss: float) -> None:
        """Count a step. loss: nats per supervised token."""
        self.step = step
        self.real_tokens += real_tokens
        self.supervised_tokens += supervised_tokens
        self.loss_sum += loss * supervised_tokens


def save_checkpoint(folder: Path, adapter: Adapter, optimizer: Optimizer, progress: Progress, keep: int = 2) -> Path:
    """Write `folder`/step-NNNNNN and drop all but the newest `keep`. Raises StorageError; earlier ones stay whole."""
    from safetensors.torch import save_file

    path = folder / f"step-{progress.step:06d}"
    tensors = {f"adapter.{key}": tensor for key, tensor in adapter.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors.update(
            {f"optimizer.{number}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        )
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors.update({f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    with whole_folder(path, marker=FIGURES) as partial:
        save_file({k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}, partial / TENSORS)
        (partial / FIGURES).write_text(json.dumps(dataclasses.asdict(progress)), encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def save_weights(path: Path, adapter: Adapter) -> Path:
    """Write an adapter's state alone, whole or not at all."""
    from safetensors.torch import save_file

    with whole_folder(path, marker=TENSORS) as partial:
        state = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in adapter.state_dict().items()}
        save_file(state, partial / TENSORS)
    return path


def load_weights(path: Path, adapter: Adapter) -> None:
    """Put back what `save_weights` wrote."""
    adapter.load_state_dict(read_tensors(path / TENSORS))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / FIGURES).exists() and (p / TENSORS).exists())


def load_checkpoint(path: Path, adapter: Adapter, optimizer: Optimizer) -> Progress:
    """Put a checkpoint back into adapter, optimizer and random generators. FormatError when it does not fit."""
    figures = read_json(path / FIGURES)
    tensors = read_tensors(path / TENSORS)
    adapter.load_state_dict({k[8:]: t for k, t in tensors.items() if k.startswith("adapter.")})
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([t for k, t in sorted(tensors.items()) if k.startswith("random.cuda.")])
    try:
        return Progress(**figures)
    except TypeError as error:
        raise FormatError(f"{path / FIGURES} is not a checkpoint of this version: {error}") from error
