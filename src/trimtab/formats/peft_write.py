"""Writing PEFT's folder, adapter_config.json and adapter_model.safetensors, so that PEFT loads it.

A method that PEFT has is saved as PEFT's own; any other in the same layout under a type of its own, and exported to
PEFT through its factors. trimtab.json beside them holds what PEFT's files have no place for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import trimtab
from trimtab.adapt.adapter import Adapter, own_state
from trimtab.adapt.attach import tensor_of
from trimtab.adapt.fingerprint import fingerprint
from trimtab.adapt.select import BIASES, base_modules
from trimtab.deltas.layout import original_class
from trimtab.deltas.lora import other_in_peft, stored_pair
from trimtab.errors import UsageError
from trimtab.files import whole_folder
from trimtab.formats.tensors import write_tensors
from trimtab.options import to_mapping

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "trimtab.json"
PREFIX = "base_model.model."
OWN_TYPE = "TRIMTAB_"


def save_adapter(adapter: Adapter, path: str | Path) -> Path:
    """Write an adapter as a folder, atomically: as PEFT's own where PEFT has the same map, else under a type of ours.

    Raises StorageError when the disk is full or the place cannot be written; an adapter that stood there stays whole.
    """
    own_state(adapter)
    return write_adapter(adapter, path)


def write_adapter(adapter: Adapter, path: str | Path) -> Path:
    """`save_adapter` of an adapter that need not be on its model."""
    method = adapter.method
    standard = method.peft_type and not any(delta.other_in_peft() for delta in adapter.deltas.values())
    config = {"peft_type": method.peft_type if standard else OWN_TYPE + method.name.upper(), **method.peft_config()}
    config |= _shared_config(adapter) | _ranks({p: d.rank_and_alpha() for p, d in adapter.deltas.items()})
    config = {key: value for key, value in config.items() if key not in method.peft_lacks}
    stored = {path: delta.stored() for path, delta in adapter.deltas.items()}
    own = {
        "trimtab": trimtab.__version__,
        "config_sha256": digest(config),
        "method": method.options(),
        "placement": to_mapping(adapter.placement),
        "provenance": provenance(adapter),
        "tied": _tied_copies(adapter),
        "base": fingerprint(adapter),
    }
    return write_folder(path, config, _tensors(adapter, stored), own)


def export_peft(adapter: Adapter, path: str | Path) -> Path:
    """Write any low-rank adapter as a standard LoRA that PEFT and others load.

    Raises UsageError when its ΔW is not low-rank, or when PEFT would compute something else with it.
    """
    own_state(adapter)
    own = adapter.method.peft_type
    for site, delta in adapter.deltas.items():
        why = delta.other_in_peft() if own else other_in_peft(delta.layout)
        if why:
            kind = own or "LoRA"
            raise UsageError(f"{site} is {why}, for which PEFT's {kind} is another map: merge the adapter instead")
    if own:
        return adapter.save(path)
    stored, ranks = {}, {}
    for site, delta in adapter.deltas.items():
        factors = delta.factors()
        if factors is None or delta.bias_change(tensor_of(adapter.sites[site], "bias")) is not None:
            raise UsageError(
                f"method '{adapter.method.name}' has no low-rank factors at {site}, so it cannot be a PEFT LoRA"
                + (": merge it instead" if adapter.method.mergeable else "")
            )
        B, A = factors
        stored[site] = stored_pair(delta.layout, A, B)
        ranks[site] = (A.shape[0], float(A.shape[0]))  # alpha = rank: the factors hold the scale
    config = {"peft_type": "LORA", "lora_dropout": 0.0, "use_rslora": False, **_shared_config(adapter), **_ranks(ranks)}
    return write_folder(path, config, _tensors(adapter, stored), None)


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True)


def digest(config: Mapping[str, Any]) -> str:
    """What tells whether a configuration is the one that trimtab.json was written with."""
    return hashlib.sha256(_json(config).encode()).hexdigest()


def _tied_copies(adapter: Adapter) -> bool:
    """Whether modules share a trained copy, as they share the weight in the base."""
    parameters = [id(p) for copies in adapter.copies.values() for p in copies.parameters()]
    return len(set(parameters)) < len(parameters)


def _tensors(adapter: Adapter, stored: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What stands in the file, by PEFT's names: what the deltas store, and the trained copies."""
    tensors = {f"{PREFIX}{site}.{name}": t for site, parts in stored.items() for name, t in parts.items()}
    for site, copies in adapter.copies.items():
        wrapped = "base_layer." if site in adapter.deltas else ""
        tensors.update({f"{PREFIX}{site}.{wrapped}{name}": t for name, t in copies.state_dict().items()})
    return tensors


def write_folder(
    path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], own: Mapping[str, Any] | None
) -> Path:
    """Write PEFT's two files and, unless it is None, `own` as trimtab.json; the folder appears whole or not at all."""
    _refuse_foreign(Path(path))
    # Copied one by one: tied copies share memory, which the format refuses.
    whole = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    with whole_folder(path, marker=CONFIG) as folder:
        write_tensors(folder / WEIGHTS, whole)
        (folder / CONFIG).write_text(_json(config), encoding="utf-8")
        if own is not None:
            (folder / OWN).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    return Path(path)


def _refuse_foreign(path: Path) -> None:
    """UsageError where replacing an adapter would take other files, such as a model's, with it."""
    inside = path.iterdir() if (path / CONFIG).is_file() else ()
    foreign = sorted(file.name for file in inside if file.name not in (CONFIG, WEIGHTS, OWN))
    if foreign:
        raise UsageError(
            f"{path} holds more than an adapter ({foreign[0]}), which would be lost: choose another folder"
        )


def _shared_config(adapter: Adapter) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_name(adapter.model) or adapter.provenance.get("base_model"),
        "revision": getattr(adapter.model, "_trimtab_revision", None),
        "task_type": _task_type(adapter),
        "inference_mode": True,
        "bias": BIASES[adapter.placement.bias],
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


def base_name(model: nn.Module) -> str | None:
    """The name that transformers loaded a model by."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def provenance(adapter: Adapter) -> dict[str, Any]:
    """Where the adapter came from; its base by the name that trimtab loaded it by, where it did."""
    base = getattr(adapter.model, "_trimtab_name", None) or base_name(adapter.model)
    return {**({"base_model": base} if base else {}), **adapter.provenance}


def _task_type(adapter: Adapter) -> str | None:
    model = adapter.model
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
    # Of these tasks PEFT expects the head in the file, and loads nothing without it.
    headed = any(path.rpartition(".")[2] in ("classifier", "score", "qa_outputs") for path in adapter.whole)
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and not headed:
        return None
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
