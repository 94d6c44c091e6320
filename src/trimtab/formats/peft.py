"""PEFT's folder, adapter_config.json and adapter_model.safetensors: read strictly here, written in `peft_write`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import (
    as_copy,
    check_name,
    fresh_delta,
    install,
    install_prompt,
    outermost,
    parts_of,
    tensor_of,
)
from trimtab.adapt.fingerprint import foreign_weight
from trimtab.adapt.module import Copies
from trimtab.adapt.prompts import PromptAdapter
from trimtab.adapt.select import BIASES, Placement, adaptable, base_modules, read_past_forward, shared_parameters
from trimtab.deltas import METHODS, method_class, saved_method
from trimtab.deltas.delta import Delta
from trimtab.deltas.method import Method
from trimtab.deltas.soft_prompt import SoftPrompt
from trimtab.errors import FormatError, UsageError, did_you_mean
from trimtab.files import read_json
from trimtab.formats.peft_prompt import stored_prompt
from trimtab.formats.peft_write import CONFIG, OWN, OWN_TYPE, PREFIX, WEIGHTS, digest
from trimtab.formats.peft_write import export_peft as export_peft
from trimtab.formats.peft_write import save_adapter as save_adapter
from trimtab.formats.tensors import read_tensors
from trimtab.options import from_mapping

log = logging.getLogger("trimtab")


def load(model: nn.Module, path: str | Path, *, name: str = "default", any_base: bool = False) -> Adapter:
    """Put a saved adapter (PEFT's or trimtab's folder) on a model and enable it alone.

    any_base: take an adapter of a base with other weights, as long as the shapes fit. An adapter that trimtab saved
    knows some of its base's values; one of PEFT's does not, and only its shapes are compared.
    Nothing is unpickled, and nothing is changed when it raises: FormatError for a broken file or an adapter of another
    base, naming the first module or shape that does not fit; UsageError for a PEFT feature trimtab does not have.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give the one that holds {CONFIG}")
    if not (folder / CONFIG).exists() and (folder / "adapter" / CONFIG).exists():
        raise UsageError(f"{folder} is a run's folder: its adapter is in {folder / 'adapter'}")
    if not (folder / WEIGHTS).exists() and list(folder.glob("*.bin")):
        raise UsageError(
            f"{folder} holds only pickled weights (.bin), which are not loaded: convert them to safetensors"
        )
    config = read_json(folder / CONFIG)
    own = _own_record(config, folder)
    tensors = read_tensors(folder / WEIGHTS)
    check_name(model, name)
    method = _method(config, own, folder)
    provenance = {**own.get("provenance", {}), "loaded_from": str(folder)}
    placement = _placement(config, own, folder)
    if isinstance(method, SoftPrompt):
        if not any_base:
            _refuse_other_base(model, own, folder)
        prompted = PromptAdapter(model, name, method, placement, provenance)
        install_prompt(prompted, *stored_prompt(prompted, tensors, folder))
        return prompted
    adapter = Adapter(model, name, method, placement, provenance)
    kind = str(config["peft_type"])
    parts, rest = _sorted_tensors(method, tensors, kind, folder)
    if method.shared:
        parts = _with_silent(parts, model, config)
    deltas = _deltas(adapter, parts, kind, folder)
    _refuse_partial(model, config, deltas, folder)
    copies = _copies(model, rest, bool(own.get("tied", config.get("ensure_weight_tying"))), folder)
    if not any_base:
        _refuse_other_base(model, own, folder)
        _refuse_other_weights(method, deltas, folder)
    install(adapter, base_modules(model), deltas, copies, None, _whole_modules(model, config, copies))
    return adapter


def _refuse_partial(model: nn.Module, config: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """FormatError when the configuration names a module of this model for which the file holds nothing."""
    targets, excluded = (_named(config.get(key)) for key in ("target_modules", "exclude_modules"))
    if config.get("layers_to_transform") is not None:
        return  # the file says which layers
    sites, _ = adaptable(base_modules(model))
    whole = tuple(f".{name}" for name in config.get("modules_to_save") or ())
    for path in sites:
        saved_whole = any(f".{path}.".find(f"{name}.") >= 0 for name in whole)
        if path not in found and targets(path) and not excluded(path) and not saved_whole:
            raise FormatError(
                f"{folder} does not fit this model: it adapts modules such as '{next(iter(found), 'none')}', but holds "
                f"nothing for '{path}': it is of a smaller model, or parts of it are missing"
            )


def _refuse_other_base(model: nn.Module, own: Mapping[str, Any], folder: Path) -> None:
    """FormatError when the base's weights are not those the adapter was made on; adapters of old do not know them."""
    try:
        foreign = foreign_weight(own.get("base", {}), base_modules(model))
    except (ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{folder / OWN} is broken: 'base' must hold values in hexadecimal ({error})") from error
    if foreign is not None:
        made_on = own["provenance"].get("base_model")
        raise FormatError(
            f"{folder} was made on another base{f', {made_on}' if made_on else ''}: there, the weight of {foreign} was "
            "not what it is here, so the adapter would not do what it learned. Load it on its own base, or on any with "
            "any_base=True (--any-base)"
        )


def _refuse_other_weights(method: Method, deltas: Mapping[str, tuple[nn.Module, Delta]], folder: Path) -> None:
    """FormatError when the method finds in its own tensors that they were made of other weights."""
    why = method.foreign(parts_of(deltas))
    if why is not None:
        raise FormatError(f"{folder} was made on another base: {why}. any_base=True (--any-base) loads it all the same")


def _named(names: str | Sequence[str] | None) -> Callable[[str], bool]:
    """PEFT's rule for module names: an expression for the whole path, or names that paths end with."""
    if isinstance(names, str):
        return re.compile(names).fullmatch if names != "all-linear" else lambda path: False  # type: ignore[return-value]
    ends = tuple(f".{name}" for name in names or ())
    return lambda path: f".{path}".endswith(ends) if ends else False


def _own_record(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """trimtab.json, unless the configuration beside it is no longer the one it was written with."""
    if not (folder / OWN).exists():
        return {}
    own = read_json(folder / OWN)
    if not all(isinstance(own.get(key), dict) for key in ("method", "placement", "provenance")):
        raise FormatError(f"{folder / OWN} is broken: it must hold method, placement and provenance")
    if own.get("config_sha256") == digest(config):
        return own
    if str(config.get("peft_type")).startswith(OWN_TYPE):
        raise FormatError(f"{folder / CONFIG} was changed after it was saved: restore it")
    log.warning("%s is of another adapter than %s beside it, and is not read", folder / OWN, CONFIG)
    return {}


def _method(config: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> Method:
    kind = config.get("peft_type")
    if kind is None:
        raise FormatError(f"{folder / CONFIG} has no 'peft_type': it is not an adapter's configuration")
    if own:
        return saved_method(own["method"])
    known = [cls for cls in map(method_class, METHODS) if cls.peft_type == kind and _bears(config, cls.peft_marks)]
    if known:
        try:
            return max(known, key=lambda cls: len(cls.peft_marks)).from_peft(config)  # of equals, the first
        except UsageError as error:
            raise UsageError(f"{folder}: {error}") from error
    if str(kind).startswith(OWN_TYPE):
        raise FormatError(f"{folder} lacks {OWN}, without which a '{kind}' adapter cannot be read")
    raise UsageError(f"{folder} is a PEFT '{kind}' adapter, which trimtab does not have")


def _bears(config: Mapping[str, Any], marks: Mapping[str, Any]) -> bool:
    return all(config.get(key) == value for key, value in marks.items())


def _placement(config: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> Placement:
    if own:
        return from_mapping(Placement, own["placement"], str(folder / OWN))
    targets = config.get("target_modules") or ()
    names = (f"re:{targets}",) if isinstance(targets, str) else tuple(sorted(targets))
    bias = {v: k for k, v in BIASES.items()}.get(config.get("bias", "none"))
    if bias is None:
        raise UsageError(f"{folder}: bias is {config['bias']!r}, but must be one of {', '.join(BIASES.values())}")
    return Placement(names, (), bias, tuple(config.get("modules_to_save") or ()))


def _whole_modules(model: nn.Module, config: Mapping[str, Any], copies: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that the configuration says are trained whole, by path. PEFT takes any path that ends in a name."""
    ends = tuple(config.get("modules_to_save") or ())
    named = [path for path in base_modules(model) if path and path.endswith(ends)]
    tied = [
        path for path, (_, copy) in copies.items() if config.get("ensure_weight_tying") and "weight" in copy._parameters
    ]
    return outermost(set(copies), dict.fromkeys([*named, *tied]))


def _sorted_tensors(
    method: Method, tensors: Mapping[str, Tensor], kind: str, folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each delta by module path, and those that belong to none."""
    names, own_names = method.stored_names, re.escape(method.name) + r"[.].+"
    if not names or kind.startswith(OWN_TYPE):  # what PEFT has no names for
        names = f"{names}|{own_names}".lstrip("|")
    stored = re.compile(rf"(.*)\.({names})")
    parts: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise FormatError(f"{folder / WEIGHTS} has a foreign tensor '{key}': every name must start with '{PREFIX}'")
        own = key.removeprefix(PREFIX)
        found = stored.fullmatch(own) or stored.fullmatch(own.removesuffix(".weight"))
        if found is None:
            rest[own] = tensor
        else:
            parts.setdefault(found[1], {})[found[2]] = tensor
    if not tensors:
        raise FormatError(f"{folder / WEIGHTS} holds no tensors")
    return parts, rest


def _with_silent(
    parts: Mapping[str, dict[str, Tensor]], model: nn.Module, config: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """`parts` with every module that the configuration names: the file has tensors of one of them alone."""
    targets, sites = _named(config.get("target_modules")), adaptable(base_modules(model))[0]
    return {path: {} for path in sites if targets(path)} | dict(parts)


def _deltas(
    adapter: Adapter, parts: Mapping[str, Mapping[str, Tensor]], kind: str, folder: Path
) -> dict[str, tuple[nn.Module, Delta]]:
    sites, refused = adaptable(base_modules(adapter.model))
    deltas: dict[str, tuple[nn.Module, Delta]] = {}
    for path in parts:
        if path not in sites:
            why = (
                f"which {refused[path]}"
                if path in refused
                else f"which this model does not have{did_you_mean(path, sites)}"
            )
            raise FormatError(f"{folder} does not fit this model: it adapts '{path}', {why}")
        with _of_module(path, folder):
            delta = fresh_delta(adapter.method, adapter.placement, sites[path], torch.Generator().manual_seed(0))
        other = None if kind.startswith(OWN_TYPE) else delta.other_in_peft()
        if other is not None:
            raise UsageError(
                f"{folder} adapts {path}, {other}, for which PEFT's {kind} is a map that trimtab does not have"
            )
        deltas[path] = (sites[path].module, delta)
    with _of_module("its weights", folder):
        adapter.method.bind(parts_of(deltas))
    for path, stored in parts.items():
        with _of_module(path, folder):
            deltas[path][1].restore(stored)
    return deltas


@contextmanager
def _of_module(path: str, folder: Path) -> Iterator[None]:
    """Say which module of which adapter an error is about."""
    try:
        yield
    except UsageError as error:
        raise FormatError(f"{folder} does not fit this model at {path}: {error}") from error


def _copies(
    model: nn.Module, rest: Mapping[str, Tensor], tie: bool, folder: Path
) -> dict[str, tuple[nn.Module, Copies]]:
    modules = base_modules(model)
    shared = shared_parameters(modules)
    unseen = read_past_forward(modules.values())
    parameters: dict[str, dict[str, nn.Parameter]] = {}
    buffers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _without_doubles(rest).items():
        path, _, name = key.rpartition(".")
        path, wrapped = path.removesuffix(".base_layer"), path.endswith(".base_layer")
        old = tensor_of(modules.get(path), name)
        misfit = f"{folder} does not fit this model:"
        if old is None:
            raise FormatError(f"{misfit} it holds '{key}', which the model has not{did_you_mean(path, modules)}")
        if old.shape != tensor.shape:
            raise FormatError(f"{misfit} '{key}' is {list(tensor.shape)} in the file, but {list(old.shape)} here")
        if modules[path] in unseen:
            raise UsageError(
                f"{folder} trains {key}, which is inside a {unseen[modules[path]]}: trimtab cannot do that"
            )
        if wrapped and name == "weight":
            _same_base(path, tensor, old, folder)
            continue
        if isinstance(old, nn.Parameter):
            holders = (shared.get(id(old)) if tie else None) or [(path, name)]
            copy = as_copy(tensor, old, tensor.dtype)
            for holder, holder_name in holders:
                parameters.setdefault(holder, {})[holder_name] = copy
        else:
            if tensor.dtype != old.dtype:
                log.warning("%s: '%s' becomes %s, as in the model, from %s", folder, key, old.dtype, tensor.dtype)
            buffers.setdefault(path, {})[name] = tensor.to(old.device, old.dtype)
    return {
        path: (modules[path], Copies(parameters.get(path, {}), buffers.get(path, {})))
        for path in dict.fromkeys([*parameters, *buffers])
    }


def _without_doubles(rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's bias mode 'all' stores the biases of modules trained whole twice more, under its wrappers' names.

    `modules_to_save` holds the same tensor again, `original_module` the one of the base that it stands in for.
    """
    kept = {}
    for key, tensor in rest.items():
        head, again, tail = key.partition(".modules_to_save.")
        same = [rest.get(f"{head}.{end}") for end in (tail, tail.partition(".")[2])] if again else []
        if not any(other is not None and torch.equal(other, tensor) for other in same):
            head, original, tail = key.partition(".original_module.")
            if not (original and f"{head}.{tail}" in rest):
                kept[key] = tensor
    return kept


def _same_base(path: str, saved: Tensor, own: Tensor, folder: Path) -> None:
    # PEFT stores the base weight of an adapted embedding beside its factors.
    if not torch.equal(saved.to(own.dtype), own.detach().cpu()):
        raise FormatError(
            f"{folder} was made for another base: it carries its own {path}.weight, which differs from the model's"
        )
