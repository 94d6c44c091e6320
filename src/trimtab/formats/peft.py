"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors, written so that PEFT loads it, read strictly.

A method that PEFT has is saved as PEFT's own; any other in the same layout under a type of its own, and exported to
PEFT through its factors. trimtab.json beside them holds what PEFT's files have no place for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import trimtab
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import check_name, fresh_delta, install
from trimtab.adapt.module import Copies
from trimtab.adapt.select import Placement, adaptable, shared_parameters
from trimtab.deltas import METHODS, make_method, method_class
from trimtab.deltas.delta import Delta
from trimtab.deltas.layout import ConvLayout
from trimtab.deltas.lora import stored_pair
from trimtab.deltas.method import Method
from trimtab.errors import FormatError, UsageError, did_you_mean
from trimtab.files import whole_folder
from trimtab.formats.tensors import read_json, read_tensors
from trimtab.options import to_mapping

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "trimtab.json"
PREFIX = "base_model.model."
BIAS_NAMES = {"none": "none", "all": "all", "adapter-only": "lora_only"}


def save_adapter(adapter: Adapter, path: str | Path) -> Path:
    """Write an adapter as a folder, atomically: as PEFT's own where PEFT has the method, else under a type of its own."""
    method = adapter.method
    config = {"peft_type": method.peft_type or f"TRIMTAB_{method.name.upper()}", **method.peft_config()}
    config |= _shared_config(adapter) | _ranks({p: d.rank_and_alpha() for p, d in adapter.deltas.items()})
    stored = {path: delta.stored() for path, delta in adapter.deltas.items()}
    own = {
        "trimtab": trimtab.__version__,
        "method": method.options(),
        "placement": to_mapping(adapter.placement),
        "provenance": adapter.provenance,
    }
    return _write(adapter, path, config, stored, own)


def export_peft(adapter: Adapter, path: str | Path) -> Path:
    """Write any low-rank adapter as a standard LoRA that PEFT and others load. UsageError when its ΔW is not low-rank."""
    if adapter.method.peft_type:
        _refuse_groups(adapter)
        return save_adapter(adapter, path)
    stored, ranks = {}, {}
    for site, delta in adapter.deltas.items():
        factors = delta.factors()
        if factors is None:
            raise UsageError(
                f"method '{adapter.method.name}' has no low-rank factors at {site}, so it cannot be a PEFT LoRA: merge it instead"
            )
        B, A = factors
        stored[site] = stored_pair(delta.layout, A, B)
        ranks[site] = (A.shape[0], float(A.shape[0]))  # alpha = rank: the factors hold the scale
    config = {"peft_type": "LORA", "lora_dropout": 0.0, "use_rslora": False, **_shared_config(adapter), **_ranks(ranks)}
    return _write(adapter, path, config, stored, None)


def _refuse_groups(adapter: Adapter) -> None:
    for path, delta in adapter.deltas.items():
        if isinstance(delta.layout, ConvLayout) and (delta.layout.groups > 1 or set(delta.layout.dilation) != {1}):
            raise UsageError(
                f"{path} is a convolution with {delta.layout.groups} groups and dilation {delta.layout.dilation}, for which "
                "PEFT's LoRA is another map: merge the adapter instead"
            )


def _write(
    adapter: Adapter,
    path: str | Path,
    config: Mapping[str, Any],
    stored: Mapping[str, Mapping[str, Tensor]],
    own: Mapping[str, Any] | None,
) -> Path:
    from safetensors.torch import save_file

    tensors = {f"{PREFIX}{site}.{name}": t for site, parts in stored.items() for name, t in parts.items()}
    for site, copies in adapter.copies.items():
        wrapped = "base_layer." if site in adapter.deltas else ""
        tensors.update({f"{PREFIX}{site}.{wrapped}{name}": t for name, t in copies.state_dict().items()})
    # Copied one by one: tied copies share memory, which the format refuses.
    whole = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    with whole_folder(path, marker=CONFIG) as folder:
        save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        if own is not None:
            (folder / OWN).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    return Path(path)


def _shared_config(adapter: Adapter) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": adapter.provenance.get("base_model") or _base_name(adapter.model),
        "task_type": _task_type(adapter.model),
        "inference_mode": True,
        "bias": BIAS_NAMES[adapter.placement.bias],
        "target_modules": _target_names(adapter),
        "modules_to_save": _saved_modules(adapter) or None,
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
        "rank_pattern": {re.escape(path): r for path, (r, _) in other.items() if r != rank},
        "alpha_pattern": {re.escape(path): _whole(a) for path, (_, a) in other.items() if a != alpha},
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
    return next((task for ending, task in endings.items() if type(model).__name__.endswith(ending)), None)


def _target_names(adapter: Adapter) -> list[str]:
    """Last parts of the paths where those name exactly the adapted modules, else the whole paths."""
    names = sorted({path.rpartition(".")[2] for path in adapter.deltas})
    everything = {path for path, _ in adapter.model.named_modules() if path.rpartition(".")[2] in names}
    return names if everything == set(adapter.deltas) else sorted(adapter.deltas)


def _saved_modules(adapter: Adapter) -> list[str]:
    """The outermost modules that are trained whole, those of which only the bias is trained excepted."""
    modules = dict(adapter.model.named_modules())
    whole = {
        path for path, copies in adapter.copies.items()
        if path not in adapter.deltas and set(copies.state_dict()) >= set(modules[path].state_dict()) - _adapter_keys(modules[path])
        and (adapter.placement.bias != "all" or set(copies.state_dict()) != {"bias"})
    }  # fmt: skip
    named = {
        path for path, module in modules.items()
        if path and any(path == n or path.endswith("." + n) for n in adapter.placement.extra_modules)
        and {p for p in whole if p == path or p.startswith(path + ".")}
    }  # fmt: skip
    covered = {p for p in whole if any(p == n or p.startswith(n + ".") for n in named)}
    return sorted(named | (whole - covered))


def _adapter_keys(module: nn.Module) -> set[str]:
    return {key for key in module.state_dict() if key.startswith(("deltas.", "copies."))}


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
    own = read_json(folder / OWN) if (folder / OWN).exists() else {}
    tensors = read_tensors(folder / WEIGHTS)
    check_name(model, name)
    method = _method(config, own, folder)
    adapter = Adapter(
        model, name, method, _placement(config, own), {**own.get("provenance", {}), "loaded_from": str(folder)}
    )
    parts, rest = _sorted_tensors(method, tensors, folder)
    deltas = _deltas(adapter, parts, folder)
    copies = _copies(adapter.model, rest, bool(config.get("ensure_weight_tying")), folder)
    dtypes = [p.dtype for _, delta in deltas.values() for p in delta.parameters()]
    install(adapter, deltas, copies, dtypes[0] if dtypes else torch.float32)
    return adapter


def _method(config: dict[str, Any], own: dict[str, Any], folder: Path) -> Method:
    kind = config.get("peft_type")
    if kind is None:
        raise FormatError(f"{folder / CONFIG} has no 'peft_type': it is not an adapter's configuration")
    if own.get("method"):
        options = dict(own["method"])
        return make_method(str(options.pop("name", "")), **options)
    for known in METHODS:
        cls = method_class(known)
        if cls.peft_type == kind:
            return cls.from_peft(config)
    raise UsageError(f"{folder} is a PEFT '{kind}' adapter, which trimtab does not have")


def _placement(config: dict[str, Any], own: dict[str, Any]) -> Placement:
    if own.get("placement"):
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in own["placement"].items()}
        return Placement(**{**saved, "slices": {k: tuple(v) for k, v in saved.get("slices", {}).items()}})
    targets = config.get("target_modules") or ()
    names = (f"re:{targets}",) if isinstance(targets, str) else tuple(sorted(targets))
    bias = {v: k for k, v in BIAS_NAMES.items()}.get(config.get("bias", "none"), "none")
    return Placement(names, (), bias, tuple(config.get("modules_to_save") or ()))


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
    adapter: Adapter, parts: Mapping[str, Mapping[str, Tensor]], folder: Path
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
    modules, shared = dict(model.named_modules()), shared_parameters(model)
    parameters: dict[str, dict[str, nn.Parameter]] = {}
    buffers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in rest.items():
        path, _, name = key.rpartition(".")
        path, wrapped = path.removesuffix(".base_layer"), path.endswith(".base_layer")
        old = _tensor(modules.get(path), name)
        if old is None:
            raise FormatError(
                f"{folder} does not fit this model: it holds '{key}', which the model has not{did_you_mean(path, modules)}"
            )
        if old.shape != tensor.shape:
            raise FormatError(
                f"{folder} does not fit this model: '{key}' is {list(tensor.shape)} in the file, but {list(old.shape)} here"
            )
        if wrapped and name == "weight":
            _same_base(path, tensor, old, folder)
        elif isinstance(old, nn.Parameter):
            copy = nn.Parameter(tensor.to(old.device, old.dtype))
            for holder, holder_name in (shared.get(id(old)) if tie else None) or [(path, name)]:
                parameters.setdefault(holder, {})[holder_name] = copy
        else:
            buffers.setdefault(path, {})[name] = tensor.to(old.device)
    return {
        path: (modules[path], Copies(parameters.get(path, {}), buffers.get(path, {})))
        for path in _in_order([*parameters, *buffers])
    }


def _in_order(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(paths))


def _tensor(module: nn.Module | None, name: str) -> Tensor | None:
    if module is None:
        return None
    found = module._parameters.get(name)
    return found if found is not None else module._buffers.get(name)


def _same_base(path: str, saved: Tensor, own: Tensor, folder: Path) -> None:
    # PEFT stores the base weight of an adapted embedding beside its factors.
    if not torch.equal(saved.to(own.dtype), cast("Tensor", own.detach().cpu())):
        raise FormatError(
            f"{folder} was made for another base: it carries its own {path}.weight, which differs from the model's"
        )
