"""PEFT's folder, adapter_config.json and adapter_model.safetensors: written so that PEFT loads it, read strictly.

A method that PEFT has is saved as PEFT's own; any other in the same layout under a type of its own, and exported to
PEFT through its factors. trimtab.json beside them holds what PEFT's files have no place for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trimtab
from trimtab.adapt.adapter import Adapter, own_state
from trimtab.adapt.attach import check_name, fresh_delta, install, outermost, tensor_of
from trimtab.adapt.module import Copies
from trimtab.adapt.select import Placement, adaptable, base_modules, read_past_forward, shared_parameters
from trimtab.deltas import METHODS, make_method, method_class
from trimtab.deltas.delta import Delta
from trimtab.deltas.layout import ConvLayout, Layout, original_class
from trimtab.deltas.lora import stored_pair
from trimtab.deltas.method import Method
from trimtab.errors import FormatError, UsageError, did_you_mean
from trimtab.files import whole_folder
from trimtab.formats.tensors import read_json, read_tensors, write_tensors
from trimtab.options import from_mapping, to_mapping

log = logging.getLogger("trimtab")
CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "trimtab.json"
PREFIX = "base_model.model."
OWN_TYPE = "TRIMTAB_"
BIAS_NAMES = {"none": "none", "all": "all", "adapter-only": "lora_only"}


def save_adapter(adapter: Adapter, path: str | Path) -> Path:
    """Write an adapter as a folder, atomically: as PEFT's own where PEFT has the same map, else under a type of ours.

    Raises StorageError when the disk is full or the place cannot be written; an adapter that stood there stays whole.
    """
    own_state(adapter)
    method = adapter.method
    standard = method.peft_type and not any(_other_in_peft(delta.layout) for delta in adapter.deltas.values())
    config = {"peft_type": method.peft_type if standard else OWN_TYPE + method.name.upper(), **method.peft_config()}
    config |= _shared_config(adapter) | _ranks({p: d.rank_and_alpha() for p, d in adapter.deltas.items()})
    stored = {path: delta.stored() for path, delta in adapter.deltas.items()}
    own = {
        "trimtab": trimtab.__version__,
        "config_sha256": _digest(_json(config)),
        "method": method.options(),
        "placement": to_mapping(adapter.placement),
        "provenance": adapter.provenance,
        "tied": _tied_copies(adapter),
    }
    return _write(adapter, path, config, stored, own)


def export_peft(adapter: Adapter, path: str | Path) -> Path:
    """Write any low-rank adapter as a standard LoRA that PEFT and others load.

    Raises UsageError when its ΔW is not low-rank, or when PEFT would compute something else with it.
    """
    own_state(adapter)
    for site, delta in adapter.deltas.items():
        why = _other_in_peft(delta.layout)
        if why:
            raise UsageError(f"{site} is {why}, for which PEFT's LoRA is another map: merge the adapter instead")
    if adapter.method.peft_type:
        return save_adapter(adapter, path)
    stored, ranks = {}, {}
    for site, delta in adapter.deltas.items():
        factors = delta.factors()
        if factors is None:
            raise UsageError(
                f"method '{adapter.method.name}' has no low-rank factors at {site}, so it cannot be a PEFT LoRA: "
                "merge it instead"
            )
        B, A = factors
        stored[site] = stored_pair(delta.layout, A, B)
        ranks[site] = (A.shape[0], float(A.shape[0]))  # alpha = rank: the factors hold the scale
    config = {"peft_type": "LORA", "lora_dropout": 0.0, "use_rslora": False, **_shared_config(adapter), **_ranks(ranks)}
    return _write(adapter, path, config, stored, None)


def _other_in_peft(layout: Layout) -> str | None:
    """What makes a convolution one whose LoRA PEFT computes otherwise: its A knows stride and padding only."""
    if isinstance(layout, ConvLayout):
        if layout.groups > 1:
            return f"a convolution with {layout.groups} groups"
        if set(layout.dilation) != {1}:
            return f"a convolution with dilation {layout.dilation}"
        if layout.padding_mode != "zeros":
            return f"a convolution with {layout.padding_mode} padding"
    return None


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tied_copies(adapter: Adapter) -> bool:
    """Whether modules share a trained copy, as they share the weight in the base."""
    parameters = [id(p) for copies in adapter.copies.values() for p in copies.parameters()]
    return len(set(parameters)) < len(parameters)


def _write(
    adapter: Adapter,
    path: str | Path,
    config: Mapping[str, Any],
    stored: Mapping[str, Mapping[str, Tensor]],
    own: Mapping[str, Any] | None,
) -> Path:
    tensors = {f"{PREFIX}{site}.{name}": t for site, parts in stored.items() for name, t in parts.items()}
    for site, copies in adapter.copies.items():
        wrapped = "base_layer." if site in adapter.deltas else ""
        tensors.update({f"{PREFIX}{site}.{wrapped}{name}": t for name, t in copies.state_dict().items()})
    # Copied one by one: tied copies share memory, which the format refuses.
    whole = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    with whole_folder(path, marker=CONFIG) as folder:
        write_tensors(folder / WEIGHTS, whole)
        (folder / CONFIG).write_text(_json(config), encoding="utf-8")
        if own is not None:
            (folder / OWN).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    return Path(path)


def _shared_config(adapter: Adapter) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": _base_name(adapter.model) or adapter.provenance.get("base_model"),
        "task_type": _task_type(adapter.model),
        "inference_mode": True,
        "bias": BIAS_NAMES[adapter.placement.bias],
        "target_modules": _target_names(adapter),
        "modules_to_save": list(adapter.whole) or None,
        "ensure_weight_tying": _tied_copies(adapter),
        "fan_in_fan_out": any(d.layout.kind == "conv1d-transposed" for d in adapter.deltas.values()),
    }


def _ranks(ranks: Mapping[str, tuple[int, float] | None]) -> dict[str, Any]:
    """r, lora_alpha and the patterns of the modules that have others."""
    known = [pair for pair in ranks.values() if pair is not None]
    if not known:
        return {}
    rank, alpha = (max(set(column), key=column.count) for column in zip(*known, strict=True))
    other = {path: pair for path, pair in ranks.items() if pair is not None}
    return {
        "r": rank,
        "lora_alpha": _whole(alpha),
        # PEFT lets any path end with a pattern, unless it says where the path starts.
        "rank_pattern": {f"^{re.escape(path)}": r for path, (r, _) in other.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": _whole(a) for path, (_, a) in other.items() if a != alpha},
    }


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _task_type(model: nn.Module) -> str | None:
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    task = next((task for ending, task in endings.items() if original_class(model).__name__.endswith(ending)), None)
    decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", True)
    return "CAUSAL_LM" if task == "SEQ_2_SEQ_LM" and decoder else task


def _target_names(adapter: Adapter) -> list[str] | str:
    """The shortest way for PEFT to find exactly the adapted modules: last names, whole paths, or an expression."""
    paths = base_modules(adapter.model)

    def found(names: Iterable[str]) -> set[str]:
        ends = tuple(f".{name}" for name in names)
        return {path for path in paths if f".{path}".endswith(ends)}

    names = sorted({path.rpartition(".")[2] for path in adapter.deltas})
    if found(names) == set(adapter.deltas):
        return names
    if found(adapter.deltas) == set(adapter.deltas):
        return sorted(adapter.deltas)
    return "|".join(re.escape(path) for path in sorted(adapter.deltas))


def load(model: nn.Module, path: str | Path, *, name: str = "default") -> Adapter:
    """Put a saved adapter (PEFT's or trimtab's folder) on a model and enable it alone.

    Nothing is unpickled, and nothing is changed when it raises: FormatError for a broken file or an adapter of another
    base, naming the first module or shape that does not fit; UsageError for a PEFT feature trimtab does not have.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give the one that holds {CONFIG}")
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
    adapter = Adapter(model, name, method, _placement(config, own, folder), provenance)
    parts, rest = _sorted_tensors(method, tensors, folder)
    deltas = _deltas(adapter, parts, str(config["peft_type"]), folder)
    _refuse_partial(model, config, deltas, folder)
    copies = _copies(model, rest, bool(own.get("tied", config.get("ensure_weight_tying"))), folder)
    install(adapter, deltas, copies, None, _whole_modules(model, config, copies))
    return adapter


def _refuse_partial(model: nn.Module, config: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """FormatError when the configuration names a module of this model for which the file holds nothing."""
    targets, excluded = (_named(config.get(key)) for key in ("target_modules", "exclude_modules"))
    if config.get("layers_to_transform") is not None:
        return  # the file says which layers
    sites, _ = adaptable(model)
    whole = tuple(f".{name}" for name in config.get("modules_to_save") or ())
    for path in sites:
        saved_whole = any(f".{path}.".find(f"{name}.") >= 0 for name in whole)
        if path not in found and targets(path) and not excluded(path) and not saved_whole:
            raise FormatError(
                f"{folder} does not fit this model: it adapts modules such as '{next(iter(found), 'none')}', but holds "
                f"nothing for '{path}': it is of a smaller model, or parts of it are missing"
            )


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
    if own.get("config_sha256") == _digest(_json(config)):
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
        options = dict(own["method"])
        return make_method(str(options.pop("name", "")), **options)
    refusals = []
    for cls in map(method_class, METHODS):
        if cls.peft_type == kind:  # several methods may share a type of PEFT's
            try:
                return cls.from_peft(config)
            except UsageError as error:
                refusals.append(error)
    if refusals:
        raise UsageError(f"{folder}: {refusals[0]}") from refusals[0]
    if str(kind).startswith(OWN_TYPE):
        raise FormatError(f"{folder} lacks {OWN}, without which a '{kind}' adapter cannot be read")
    raise UsageError(f"{folder} is a PEFT '{kind}' adapter, which trimtab does not have")


def _placement(config: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> Placement:
    if own:
        return from_mapping(Placement, own["placement"], str(folder / OWN))
    targets = config.get("target_modules") or ()
    names = (f"re:{targets}",) if isinstance(targets, str) else tuple(sorted(targets))
    bias = {v: k for k, v in BIAS_NAMES.items()}.get(config.get("bias", "none"))
    if bias is None:
        raise UsageError(f"{folder}: bias is {config['bias']!r}, but must be one of {', '.join(BIAS_NAMES.values())}")
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
    method: Method, tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each delta by module path, and those that belong to none."""
    stored = re.compile(rf"(.*)\.({method.stored_names or re.escape(method.name) + r'[.].+'})")
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


def _deltas(
    adapter: Adapter, parts: Mapping[str, Mapping[str, Tensor]], kind: str, folder: Path
) -> dict[str, tuple[nn.Module, Delta]]:
    sites, refused = adaptable(adapter.model)
    deltas = {}
    for path, stored in parts.items():
        if path not in sites:
            why = (
                f"which {refused[path]}"
                if path in refused
                else f"which this model does not have{did_you_mean(path, sites)}"
            )
            raise FormatError(f"{folder} does not fit this model: it adapts '{path}', {why}")
        other = _other_in_peft(sites[path].layout)
        if other and not kind.startswith(OWN_TYPE):
            raise UsageError(
                f"{folder} adapts {path}, {other}, for which PEFT's LoRA is a map that trimtab does not have"
            )
        try:
            delta = fresh_delta(adapter.method, adapter.placement, sites[path], torch.Generator().manual_seed(0))
            delta.restore(stored)
        except UsageError as error:
            raise FormatError(f"{folder} does not fit this model at {path}: {error}") from error
        deltas[path] = (sites[path].module, delta)
    return deltas


def _copies(
    model: nn.Module, rest: Mapping[str, Tensor], tie: bool, folder: Path
) -> dict[str, tuple[nn.Module, Copies]]:
    modules, shared = base_modules(model), shared_parameters(model)
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
        if tensor.dtype != old.dtype:
            log.warning(
                "%s: '%s' is %s in the file and becomes %s, as in the model", folder, key, tensor.dtype, old.dtype
            )
        if isinstance(old, nn.Parameter):
            holders = (shared.get(id(old)) if tie else None) or [(path, name)]
            copy = nn.Parameter(tensor.to(old.device, old.dtype))
            for holder, holder_name in holders:
                parameters.setdefault(holder, {})[holder_name] = copy
        else:
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
