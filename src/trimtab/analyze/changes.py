"""Changes of weights, wherever they come from: an adapter, a checkpoint of a run, a fine-tuned model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, own_state
from trimtab.adapt.attach import check_name, fresh_delta, install
from trimtab.adapt.select import ALL_LINEAR, Placement, Site, adaptable, base_modules, choose
from trimtab.deltas import saved_method
from trimtab.deltas.delta import wide
from trimtab.deltas.method import Method
from trimtab.deltas.method import Site as DeltaSite
from trimtab.errors import FormatError, UsageError, did_you_mean
from trimtab.files import read_json
from trimtab.formats.peft import load
from trimtab.formats.peft_write import CONFIG
from trimtab.formats.tensors import read_tensors
from trimtab.models.checkpoint import check_folder
from trimtab.train.checkpoint import FIGURES, TENSORS, foreign_base

Change = Tensor | tuple[Tensor, Tensor]
"""ΔW [out, in], or (B [out, r], A [r, in]) with ΔW = B A."""

Kind = Literal["adapter", "checkpoint", "model"]

ON_MODEL = "measured"
"""The name of an adapter on the model while it is looked at."""


LOOKED_AT = 8
"""Of so many weights it is looked at whether a fine-tuned model is one of this base."""


class Changed(NamedTuple):
    """A frozen weight [out, in] and what changes it. change: a function, so that dense ΔW are made one at a time."""

    path: str
    weight: Tensor
    change: Callable[[], Change]


def of_adapter(adapter: Adapter) -> list[Changed]:
    """The weights an adapter changes, in the model's order; the parts of a fused projection each for itself.

    Raises UsageError for a method whose map no weight can compute, and while something is merged: the weights are then
    not the frozen ones.
    """
    if not adapter.method.mergeable:
        raise UsageError(f"{adapter.method.title} adds what no weight can compute: it has no ΔW, and so no directions")
    if own_state(adapter).merged is not None:
        raise UsageError(f"adapter '{adapter.name}' is on a model with merged weights: unmerge them first")
    order = {path: place for place, path in enumerate(base_modules(adapter.model))}
    sites = sorted(adapter.weights(), key=lambda site: order[rows_of(site.path)[0]])
    return [Changed(site.path, site.delta.layout.matrix(site.weight), partial(_of_delta, site)) for site in sites]


@torch.no_grad()
def _of_delta(site: DeltaSite) -> Change:
    return site.delta.factors() or site.delta.weight_change(site.weight)


def of_model(model: nn.Module, tuned: Mapping[str, Tensor], paths: Iterable[str] | None = None) -> list[Changed]:
    """What fine-tuning changed of a model. tuned: the fine-tuned state dict, or `StoredTensors` of its folder.

    paths: the modules to look at, by default every linear layer but the output head. Raises FormatError for a weight
    that is absent or of another shape, and for a model that was not fine-tuned from this one.
    """
    modules = base_modules(model)
    if paths is None:
        sites = choose(model, modules, (ALL_LINEAR,))
    else:
        all_sites = adaptable(modules)[0]
        sites = [all_sites[path] for path in paths if path in all_sites]
    found = []
    for site in sites:
        weight, other = _weight(site), _tensor(tuned, f"{site.path}.weight")
        found.append(Changed(site.path, site.layout.matrix(weight), partial(_of_site, site, other)))
    _refuse_other_model(found)
    return found


def _weight(site: Site) -> Tensor:
    weight: Any = site.module._parameters["weight"]
    return weight.detach()  # type: ignore[no-any-return]


def _of_site(site: Site, tuned: Callable[[], Tensor]) -> Tensor:
    return site.layout.matrix(difference(f"{site.path}.weight", _weight(site), tuned()))


def of_states(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> list[Changed]:
    """What fine-tuning changed between two state dicts, or the `StoredTensors` of two folders.

    Of tensors called `.weight`, those with a dimension or more beside the first, flattened to [out, in].
    """
    found = []
    for name, weight in base.items():
        if name.endswith(".weight") and weight.ndim > 1 and weight.is_floating_point():
            other = _tensor(tuned, name)
            change = partial(_of_tensors, name, weight, other)
            found.append(Changed(name.removesuffix(".weight"), weight.detach().flatten(1), change))
    _refuse_other_model(found)
    return found


def _of_tensors(name: str, base: Tensor, tuned: Callable[[], Tensor]) -> Tensor:
    return difference(name, base.detach(), tuned()).flatten(1)


def _tensor(tuned: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
    if name not in tuned:
        raise FormatError(f"the fine-tuned model has no '{name}'{did_you_mean(name, tuned)}: is it of this base?")
    return partial(tuned.__getitem__, name)


def difference(name: str, base: Tensor, tuned: Tensor) -> Tensor:
    """ΔW = tuned − base in fp32. FormatError where the shapes differ."""
    if base.shape != tuned.shape:
        raise FormatError(
            f"'{name}' is {list(tuned.shape)} in the fine-tuned model, but {list(base.shape)} in the base"
        )
    return wide(tuned.detach()).to(base.device) - wide(base)


def _refuse_other_model(changes: Sequence[Changed]) -> None:
    """FormatError when the fine-tuned model is none: every one of a few weights differs by more than its own size."""
    some = [changes[i * len(changes) // LOOKED_AT] for i in range(LOOKED_AT)] if len(changes) > LOOKED_AT else changes
    for changed in some:
        change = changed.change()
        assert isinstance(change, Tensor)
        if float(change.norm()) <= float(wide(changed.weight).norm()):
            return
    if some:
        raise FormatError(f"{some[0].path} differs from the base by more than its own size: it is of another model")


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a model's folder by name, each read from its safetensors file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        from safetensors import safe_open

        self._open = partial(safe_open, framework="pt")
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            with self._open(file) as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._files[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def aligned(changes: Sequence[Changed], paths: Iterable[str]) -> list[Changed]:
    """The changes of these weights, in their order; of a whole fused projection the rows that a path 'name[a:b]' says.

    A path that nothing changes is left out.
    """
    known = {changed.path: changed for changed in changes}
    found = []
    for path in paths:
        whole, start, stop = rows_of(path)
        if path in known:
            found.append(known[path])
        elif whole in known:
            weight = known[whole].weight[start:stop]
            found.append(Changed(path, weight, partial(_rows, known[whole].change, slice(start, stop))))
    return found


def rows_of(path: str) -> tuple[str, int, int | None]:
    """(module, first row, row after the last) of a weight's path; all rows but where it ends in [a:b]."""
    sliced = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", path)
    return (sliced[1], int(sliced[2]), int(sliced[3])) if sliced else (path, 0, None)


def _rows(change: Callable[[], Change], rows: slice) -> Change:
    made = change()
    return made[rows] if isinstance(made, Tensor) else (made[0][rows], made[1])


def kind_of(folder: Path) -> Kind:
    """What a folder holds. UsageError when it is none of the three."""
    if (folder / CONFIG).is_file() or (folder / "adapter" / CONFIG).is_file():
        return "adapter"
    if (folder / FIGURES).is_file() and (folder / TENSORS).is_file():
        return "checkpoint"
    if (folder / "config.json").is_file():
        return "model"
    raise UsageError(
        f"{folder} holds no adapter ({CONFIG}), no checkpoint ({FIGURES} and {TENSORS}) and no model (config.json)"
    )


@contextmanager
def read_changes(
    folder: Path, model: nn.Module, *, any_base: bool = False, paths: Iterable[str] | None = None
) -> Iterator[list[Changed]]:
    """The changes that a folder holds: an adapter's, a run's, a checkpoint's or a fine-tuned model's.

    model: their base; it carries the adapter until the end of the block. any_base: see `trimtab.load`. paths: of a
    fine-tuned model, the weights to look at. Raises UsageError and FormatError for what does not fit the model.
    """
    kind = kind_of(folder)
    if kind == "model":
        modules = None if paths is None else dict.fromkeys(rows_of(path)[0] for path in paths)
        yield of_model(model, StoredTensors(folder), modules)
        return
    if kind == "adapter":
        own = folder if (folder / CONFIG).is_file() else folder / "adapter"
        adapter = load(model, own, name=ON_MODEL, any_base=any_base)
    else:
        adapter = load_checkpoint(model, folder, any_base=any_base)
    try:
        yield of_adapter(adapter)
    finally:
        adapter.remove()


def load_checkpoint(model: nn.Module, folder: Path, any_base: bool = False) -> Adapter:
    """Put the deltas of a run's checkpoint on a model; trained copies, which change no direction, are left out.

    FormatError when it is damaged or of another model or base, UsageError for slices, which it does not tell of.
    """
    method = _method(folder)
    if method.shared:
        raise UsageError(
            f"{folder} is a checkpoint that does not tell which weights share it: give the adapter folder of its run"
        )
    tensors = read_tensors(folder / TENSORS)
    state = {key.removeprefix("adapter."): t for key, t in tensors.items() if key.startswith("adapter.")}
    sites = adaptable(base_modules(model))[0]
    deltas: dict[str, Tensor] = {}
    paths: dict[str, None] = {}
    for key, tensor in state.items():
        path = next((path for path in _parents(key) if path in sites), None)
        if key.removeprefix(f"{path}.").startswith("copy.") or (path is None and ".copy." in key):
            continue
        if path is None:
            raise FormatError(f"{folder} does not fit this model: it holds '{key}', which the model has not")
        if key.removeprefix(f"{path}.").startswith("parts."):
            raise UsageError(f"{folder} is a checkpoint with slices of {path}: give the adapter folder of its run")
        deltas[key], paths[path] = tensor, None
    dtype = next((t.dtype for t in deltas.values() if t.is_floating_point()), torch.float32)
    targets, random = tuple(f"re:{re.escape(path)}" for path in paths), torch.Generator().manual_seed(0)
    check_name(model, ON_MODEL)
    adapter = Adapter(model, ON_MODEL, method, Placement(targets), {})
    # Made as from a file: a start that is worked out of the weights is in the checkpoint.
    made = {path: (sites[path].module, fresh_delta(method, adapter.placement, sites[path], random)) for path in paths}
    install(adapter, base_modules(model), made, {}, dtype, ())
    try:
        adapter.load_state_dict(deltas)
    except UsageError as error:
        adapter.remove()
        raise FormatError(f"{folder} does not fit this model: {error}") from error
    why = None if any_base else _of_another_base(adapter, folder)
    if why is not None:
        adapter.remove()
        raise FormatError(
            f"{folder} was made on another base: {why}. any_base=True (--any-base) measures it all the same"
        )
    return adapter


def _of_another_base(adapter: Adapter, folder: Path) -> str | None:
    """What tells that a checkpoint was made on other weights than those it has been put on; None when nothing does."""
    foreign = foreign_base(folder, adapter.model)
    if foreign is not None:
        return f"there, the weight of {foreign} was not what it is here"
    return adapter.method.foreign(adapter.weights())


def _method(folder: Path) -> Method:
    try:
        return saved_method(read_json(folder / FIGURES)["run"]["method"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise FormatError(f"{folder / FIGURES} is not a checkpoint of this version ({error})") from error


def _parents(key: str) -> Iterator[str]:
    """The paths above a key of a state dict, the nearest first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key
