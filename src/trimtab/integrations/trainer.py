"""trimtab's adapters under transformers' own Trainer.

Deltas are children of the model's own modules, so the Trainer finds their parameters, saves and restores their tensors.
What it cannot know is what a method does beside gradient steps. `AdapterCallback` does that at the Trainer's events,
which come in this order (transformers 5.23, trainer.py). Before: weights are loaded from the checkpoint, optimizer and
scheduler are made and loaded, on_train_begin. Each optimizer step: gradients are clipped, on_pre_optimizer_step,
optimizer.step, on_optimizer_step, scheduler.step, gradients are cleared, global_step grows, on_step_end. Then, where it
is time: evaluation; weights, optimizer and state are saved, on_save.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trimtab.adapt.adapter import Adapter, adapters, state_of
from trimtab.adapt.fingerprint import fingerprint, foreign_weight
from trimtab.adapt.select import base_modules
from trimtab.errors import UsageError, did_you_mean, problems_to_error

log = logging.getLogger("trimtab")

Groups = list[tuple[dict[str, Any], list[nn.Parameter]]]
"""An optimizer's parameter groups, each with the parameters it has outside of a step."""


class AdapterCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Lets any method work under transformers.Trainer: give it among `callbacks`.

    adapter: the one to train, or its name. When training begins the method is prepared for the whole run (UsageError
    when it cannot work in it, before any step). Once a step the gradient of what the method adds to the loss is taken.
    After each optimizer step, outside forward and with the gradients still there, the method's `after_step` is called,
    and the optimizer forgets what it gathered about the parameters that it returns; steps that a gradient scaler skips
    do not count. The method's learning-rate factors hold while the optimizer steps. What is evaluated before the method
    has settled is never the best model. A checkpoint gets adapter/, a folder as `Adapter.save` writes it, and its
    model.safetensors holds what is trained and not the frozen base. A resumed run ends with the same bits as one that
    was never stopped; UsageError when method or base are others than they were, or when the adapter did not come back
    as it was.
    """

    def __init__(self, adapter: Adapter | str = "default") -> None:
        self.name = adapter if isinstance(adapter, str) else adapter.name
        self.saved: dict[str, Any] | None = None
        self._adapter: Adapter | None = None
        self._steps = 0
        self._settled = False
        self._factors: dict[nn.Parameter, float] = {}
        self._groups: Groups = []
        self._hook: RemovableHandle | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint's trainer_state.json."""
        if self._adapter is not None:
            self.saved = {"steps": self._steps, "weights": _digest(self._adapter), **_identity(self._adapter)}
        return {"args": {"adapter": self.name}, "attributes": {"saved": self.saved}}

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        # The Trainer loads a checkpoint before on_train_begin.
        self._hook = given["model"].register_load_state_dict_post_hook(_without_base_none_is_missing)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model, optimizer = given["model"], given["optimizer"]
        adapter = _trainable(model, self.name, optimizer)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):
            raise UsageError("the Trainer was given more than one AdapterCallback: train one adapter at a time")
        self._steps = _resumed(adapter, saved) if state.global_step else 0
        adapter.prepare(self._steps + state.max_steps - state.global_step)
        self._settled = adapter.method.settled(self._steps, adapter.weights())
        self._adapter, self._factors = adapter, adapter.lr_factors()
        if hasattr(model, "save_pretrained"):
            SaveTrained.put(model, Path(args.output_dir))

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert self._adapter is not None
        penalty = self._adapter.penalty()  # no gradient is there yet, and none is clipped
        if penalty is None:
            return
        if args.fp16:
            name = self._adapter.method.name
            raise UsageError(
                f"method '{name}' adds to the loss, which the scaling of fp16 would not reach: train in bf16 or fp32"
            )
        penalty.backward()  # type: ignore[no-untyped-call]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._groups = _split(given["optimizer"], self._factors)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        optimizer = given["optimizer"]
        _join(optimizer, self._groups)
        if getattr(optimizer, "step_was_skipped", False):
            return
        assert self._adapter is not None
        self._steps += 1
        for parameter in self._adapter.after_step(self._steps):
            optimizer.state.pop(parameter, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._settled:
            return
        assert self._adapter is not None
        # What was evaluated before this step is of weights that cannot be the run's result.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self._settled = self._adapter.method.settled(self._steps, self._adapter.weights())

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not state.is_world_process_zero:
            return
        assert self._adapter is not None
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if folder.is_dir():
            self._adapter.save(folder / "adapter")
        else:  # a search over hyperparameters has folders of its own
            log.warning("%s does not exist, so the checkpoint has no folder adapter/", folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._adapter, self.saved = None, None
        if self._hook is not None:
            self._hook.remove()
        SaveTrained.take_off(given["model"])


class SaveTrained:
    """Stands for a model's save_pretrained during a run: checkpoints get what is trained, other folders everything."""

    def __init__(self, model: Any, output_dir: Path) -> None:
        self.model, self.output_dir, self.save = model, output_dir, model.save_pretrained

    @classmethod
    def put(cls, model: Any, output_dir: Path) -> None:
        """Let a model's checkpoints below `output_dir` hold what is trained; one with a way of its own keeps that."""
        cls.take_off(model)  # a run that was interrupted left it
        if "save_pretrained" not in vars(model):
            vars(model)["save_pretrained"] = cls(model, output_dir)

    @classmethod
    def take_off(cls, model: Any) -> None:
        """Undo `put`."""
        if isinstance(vars(model).get("save_pretrained"), cls):
            del vars(model)["save_pretrained"]

    def __call__(self, save_directory: str | Path, **options: Any) -> None:
        """As `PreTrainedModel.save_pretrained`."""
        folder = Path(save_directory)
        checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) and self.output_dir in folder.parents
        if checkpoint and options.get("state_dict") is None:
            # Under the names that the model has: the Trainer loads them back as they are, while save_pretrained would
            # turn them into those of the original checkpoint.
            options |= {"state_dict": trained_tensors(self.model), "save_original_format": False}
        self.save(save_directory, **options)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict without the frozen parameters of the base; a parameter that modules share is there once."""
    own = {id(p) for adapter in adapters(model).values() for p in adapter.parameters()}
    found: dict[int, tuple[str, Tensor]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter) or tensor.requires_grad or id(tensor) in own:
            found.setdefault(id(tensor), (key, tensor.detach()))
    return dict(found.values())


def _without_base_none_is_missing(model: nn.Module, incompatible: Any) -> None:
    """Tell of no missing keys where those are exactly what `trained_tensors` leaves out."""
    if set(incompatible.missing_keys) == model.state_dict().keys() - trained_tensors(model).keys():
        incompatible.missing_keys.clear()


def _trainable(model: nn.Module, name: str, optimizer: torch.optim.Optimizer) -> Adapter:
    """The adapter of that name. UsageError when training would not train it."""
    state = state_of(model)
    if name not in state.adapters:
        raise UsageError(f"the model has no adapter '{name}'{did_you_mean(name, state.adapters)}: attach it first")
    adapter, problems = state.adapters[name], []
    if state.merged is not None:
        problems.append(f"adapter '{state.merged.names[0]}' is merged into the weights: unmerge it first")
    elif not adapter.enabled:
        problems.append(f"adapter '{name}' is not enabled, so nothing would be learned: enable it first")
    if any(p.dtype == torch.float16 for p in adapter.parameters()):
        problems.append("float16 parameters overflow in training: attach the adapter in float32 or bfloat16")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(p.requires_grad and id(p) not in known for p in adapter.parameters()):
        problems.append(
            f"the optimizer ({type(getattr(optimizer, 'optimizer', optimizer)).__name__}) does not have the parameters "
            f"of adapter '{name}': attach it before the optimizer is made, and use none that replaces parameters"
        )
    problems_to_error(problems, "training")
    return adapter


def _identity(adapter: Adapter) -> dict[str, Any]:
    """The method and the base that a checkpoint is of."""
    return {"method": json.loads(json.dumps(adapter.method.options())), "base": fingerprint(adapter)}


def _digest(adapter: Adapter) -> str:
    """SHA-256 of everything in an adapter's state dict."""
    digest = hashlib.sha256()
    for key, tensor in sorted(adapter.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _resumed(adapter: Adapter, entry: Mapping[str, Any] | None) -> int:
    """The optimizer steps that a checkpoint was made after. UsageError when the run would not go on as it was."""
    saved = entry["attributes"]["saved"] if entry else None
    if saved is None:
        raise UsageError("the checkpoint was written without an AdapterCallback, so it cannot be resumed with one")
    before, now = saved["method"], _identity(adapter)["method"]
    problems = [
        f"{key} was {before.get(key)!r}, and is {now.get(key)!r} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    foreign = foreign_weight(saved["base"], base_modules(adapter.model))
    if foreign is not None:
        problems.append(f"the base is another one: '{foreign}' has other weights")
    problems_to_error(problems, "the checkpoint is of another run")
    if _digest(adapter) != saved["weights"]:
        raise UsageError(
            f"the checkpoint did not restore adapter '{adapter.name}': attach it with the name and the targets it had"
        )
    steps: int = saved["steps"]
    return steps


def _split(optimizer: torch.optim.Optimizer, factors: Mapping[nn.Parameter, float]) -> Groups:
    """Give the parameters that have a learning-rate factor groups of their own, at the rate of the group they were in.

    For the time of one step, so that scheduler and checkpoint see the groups that the Trainer made. Returns what
    `_join` needs.
    """
    whole: Groups = [(group, group["params"]) for group in optimizer.param_groups]
    for group, parameters in whole if factors else ():
        group["params"] = [p for p in parameters if p not in factors]
        for factor in sorted({factors[p] for p in parameters if p in factors}):
            own = [p for p in parameters if factors.get(p) == factor]
            optimizer.param_groups.append({**group, "params": own, "lr": group["lr"] * factor})
    return whole


def _join(optimizer: torch.optim.Optimizer, whole: Groups) -> None:
    """Undo `_split`."""
    del optimizer.param_groups[len(whole) :]
    for group, parameters in whole:
        group["params"] = parameters
