"""Checkpoints: what a run needs to go on as if it had never stopped, written whole or not at all, never pickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.fingerprint import fingerprint, foreign_weight
from trimtab.adapt.select import base_modules
from trimtab.data.encode import Example
from trimtab.errors import FormatError, UsageError, problems_to_error
from trimtab.files import read_json, whole_folder
from trimtab.formats.tensors import read_tensors, write_tensors
from trimtab.models.checkpoint import check_safetensors
from trimtab.options import to_mapping
from trimtab.train.settings import Settings

log = logging.getLogger("trimtab")

COMPARED = 5
"""How many steps at a run's start and end its losses are kept of, to tell whether it diverged."""

TENSORS, FIGURES = "state.safetensors", "state.json"


@dataclasses.dataclass
class Progress:
    """How far a run is. Counters are since its first step; loss_sum is in nats, the other losses a supervised token.

    eval_loss_before: before the first step. first_losses, last_losses: of the first and the newest few steps.
    still_steps: those whose gradient was exactly 0.
    """

    step: int = 0
    real_tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    eval_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    eval_loss_before: float | None = None
    first_losses: list[float] = dataclasses.field(default_factory=list)
    last_losses: list[float] = dataclasses.field(default_factory=list)
    still_steps: int = 0

    def add(self, step: int, real_tokens: int, supervised_tokens: int, loss: float, grad_norm: float) -> None:
        """Count a step. loss: nats per supervised token."""
        self.step = step
        self.real_tokens += real_tokens
        self.supervised_tokens += supervised_tokens
        self.loss_sum += loss * supervised_tokens
        if supervised_tokens:
            self.first_losses = [*self.first_losses, loss][:COMPARED]
            self.last_losses = [*self.last_losses, loss][-COMPARED:]
            self.still_steps += grad_norm == 0


def run_identity(
    adapter: Adapter, settings: Settings, examples: Sequence[Example], eval_examples: Sequence[Example]
) -> dict[str, Any]:
    """What a run is made from: with another method, settings, data or base, resuming would be wrong."""
    data = {"training data": _digest(examples), "evaluation data": _digest(eval_examples)}
    return {"method": adapter.method.options(), **to_mapping(settings), **data, "base": fingerprint(adapter)}


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.content())
    return f"{len(examples)} examples, {digest.hexdigest()[:12]}"


def save_checkpoint(
    folder: Path,
    adapter: Adapter,
    optimizer: Optimizer,
    progress: Progress,
    identity: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder`/step-NNNNNN and drop all but the newest `keep`. Raises StorageError; earlier ones stay whole."""
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
        write_tensors(partial / TENSORS, _on_cpu(tensors))
        figures = {"progress": dataclasses.asdict(progress), "run": identity}
        (partial / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def save_weights(path: Path, adapter: Adapter) -> Path:
    """Write an adapter's state alone, whole or not at all."""
    with whole_folder(path, marker=TENSORS) as partial:
        write_tensors(partial / TENSORS, _on_cpu(adapter.state_dict()))
    return path


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Copied one by one: the file format refuses tensors that share memory.
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}


def load_weights(path: Path, adapter: Adapter) -> None:
    """Put back what `save_weights` wrote."""
    adapter.load_state_dict(read_tensors(path / TENSORS))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    whole = (p for p in folder.glob("step-*") if (p / FIGURES).exists() and (p / TENSORS).exists())
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))


def clear_partial(folder: Path) -> None:
    """Take away what a run that was killed while saving has left behind."""
    whole = set(checkpoints(folder))
    for path in [*folder.glob(".step-*"), *folder.glob("step-*")]:
        if path not in whole:
            shutil.rmtree(path, ignore_errors=True)


def load_newest(folder: Path, adapter: Adapter, optimizer: Optimizer, identity: Mapping[str, Any]) -> Progress | None:
    """Put the newest checkpoint in a folder back; None when there is none. Errors as of `load_checkpoint`.

    A damaged one is never passed over in silence: the FormatError says which earlier one is whole.
    """
    found = checkpoints(folder)
    if not found:
        return None
    try:
        return load_checkpoint(found[-1], adapter, optimizer, identity)
    except FormatError as error:
        whole = [path for path in found[:-1] if _is_whole(path)]
        if not whole:
            raise FormatError(f"{error}. No other checkpoint is whole: start anew in another folder") from error
        broken = " and ".join(map(str, found[found.index(whole[-1]) + 1 :]))
        raise FormatError(f"{error}. {whole[-1].name} before it is whole: delete {broken}, and resume again") from error


def _is_whole(path: Path) -> bool:
    try:
        check_safetensors(path / TENSORS)
        Progress(**read_json(path / FIGURES)["progress"])
    except (UsageError, KeyError, TypeError):
        return False
    return True


def load_checkpoint(path: Path, adapter: Adapter, optimizer: Optimizer, identity: Mapping[str, Any]) -> Progress:
    """Put a checkpoint back into adapter, optimizer and random generators.

    FormatError when it is no checkpoint, UsageError naming what differs when it is of another run.
    """
    figures = read_json(path / FIGURES)
    try:
        progress, before = Progress(**figures["progress"]), dict(figures["run"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path / FIGURES} is not a checkpoint of this version ({error})") from error
    now = json.loads(json.dumps(identity))
    changed = [key for key in {**before, **now} if key != "base" and before.get(key) != now.get(key)]
    problems = [f"{key} was {before.get(key)!r}, and is {now.get(key)!r} now" for key in changed]
    foreign = foreign_base(path, adapter.model)
    if foreign is not None:
        problems.append(f"the base is another one: '{foreign}' has other weights")
    problems_to_error(problems, f"{path} is of another run")
    tensors = read_tensors(path / TENSORS)
    adapter.load_state_dict({k[8:]: t for k, t in tensors.items() if k.startswith("adapter.")})
    _load_optimizer(optimizer, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    saved = [tensors[f"random.cuda.{i}"] for i in range(sum(key.startswith("random.cuda.") for key in tensors))]
    here = torch.cuda.device_count()
    if len(saved) != here:
        log.warning("the run had %d GPUs and there are %d here: it goes on, but not bit for bit", len(saved), here)
    for index, state in enumerate(saved[:here]):
        torch.cuda.set_rng_state(state, index)
    return progress


def foreign_base(path: Path, model: nn.Module) -> str | None:
    """The first module of a model whose weight is not the one that a checkpoint's run had; None on its own base.

    A checkpoint of old does not tell. FormatError when it is none.
    """
    figures = read_json(path / FIGURES)
    try:
        return foreign_weight(figures["run"].get("base", {}), base_modules(model))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path / FIGURES} is not a checkpoint of this version ({error})") from error


def _load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
