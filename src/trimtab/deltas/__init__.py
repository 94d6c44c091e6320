"""What a change to a weight is: one file per method, and this registry.

A new method is one new file here and one line in METHODS.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from trimtab.deltas.method import Method
from trimtab.errors import UsageError, did_you_mean
from trimtab.options import from_mapping

DEFAULT = "lora"
"""The method where the user names none."""

METHODS: dict[str, str] = {
    "lora": "trimtab.deltas.lora:LoRA",
    "dash": "trimtab.deltas.dash:Dash",
    "dora": "trimtab.deltas.dora:DoRA",
    "adalora": "trimtab.deltas.adalora:AdaLoRA",
    "vera": "trimtab.deltas.vera:VeRA",
    "lora-xs": "trimtab.deltas.lora_xs:LoRAXS",
    "flora": "trimtab.deltas.flora:FLoRA",
    "moslora": "trimtab.deltas.moslora:MoSLoRA",
    "lora-plus": "trimtab.deltas.lora_plus:LoRAPlus",
    "rslora": "trimtab.deltas.rslora:RsLoRA",
    "lora-fa": "trimtab.deltas.lora_fa:LoRAFA",
    "pissa": "trimtab.deltas.pissa:PiSSA",
    "milora": "trimtab.deltas.milora:MiLoRA",
    "olora": "trimtab.deltas.olora:OLoRA",
    "full": "trimtab.deltas.full:Full",
    "subspace": "trimtab.deltas.subspace:RandomSubspace",
    "ia3": "trimtab.deltas.ia3:IA3",
    "bitfit": "trimtab.deltas.bitfit:BitFit",
    "houlsby": "trimtab.deltas.houlsby:Houlsby",
    "pfeiffer": "trimtab.deltas.pfeiffer:Pfeiffer",
    "parallel": "trimtab.deltas.parallel:Parallel",
    "prefix-tuning": "trimtab.deltas.prefix_tuning:PrefixTuning",
    "p-tuning": "trimtab.deltas.p_tuning:PTuning",
    "prompt-tuning": "trimtab.deltas.prompt_tuning:PromptTuning",
}
"""Name of each method and where its class is."""


def _place(name: str) -> tuple[str, str]:
    if name not in METHODS:
        raise UsageError(f"unknown method '{name}'{did_you_mean(name, METHODS)} (known: {', '.join(METHODS)})")
    module, _, cls = METHODS[name].partition(":")
    return module, cls


def method_class(name: str) -> type[Method]:
    """The class of a registered method. UsageError for an unknown name."""
    module, cls = _place(name)
    return cast("type[Method]", getattr(importlib.import_module(module), cls))


def make_method(name: str, **options: Any) -> Method:
    """A method from its name and options, as they stand in YAML; every problem is named at once."""
    return from_mapping(method_class(name), options, f"method {name}")


def saved_method(options: Mapping[str, Any]) -> Method:
    """The method that `Method.options` was written of."""
    rest = dict(options)
    return make_method(str(rest.pop("name", "")), **rest)


def method_spec(name: str) -> type[Method]:
    """The dataclass of a method without the deltas beside it, and so without importing torch.

    For `--help` and `list`, which must answer at once: only the class statement of the method's file is run, with
    those imports that do not lead to torch, constants, and the methods of other files it builds on. Its fields and
    docstring are the real ones.
    """
    module, cls = _place(name)
    if f"{module}:spec" not in sys.modules:
        package, _, file = module.rpartition(".")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            return method_class(name)
        path = Path(found.submodule_search_locations[0]) / f"{file}.py"
        _run_light(path, f"{module}:spec", cls)
    return cast("type[Method]", getattr(sys.modules[f"{module}:spec"], cls))


LIGHT = {"__future__", "dataclasses", "typing", "collections.abc", "math"}
LIGHT |= {
    "trimtab.deltas.method",
    "trimtab.deltas.places",
    "trimtab.deltas.ranked",
    "trimtab.deltas.bottleneck",
    "trimtab.deltas.soft_prompt",
    "trimtab.errors",
    "trimtab.options",
    "trimtab.patterns",
}
"""Modules a method's class statement may need that do not import torch."""


def _run_light(file: Path, name: str, cls: str) -> None:
    """Run the class statement `cls` of a file, and what it needs, as the module `name`."""
    light = types.ModuleType(name)
    body: list[ast.stmt] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module not in LIGHT:
            for method, place in METHODS.items():
                for alias in node.names:
                    if place == f"{node.module}:{alias.name}":
                        setattr(light, alias.asname or alias.name, method_spec(method))
        elif (
            isinstance(node, ast.ImportFrom)
            or (isinstance(node, ast.Import) and all(alias.name in LIGHT for alias in node.names))
            or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
            or (isinstance(node, ast.ClassDef) and node.name == cls)
        ):
            body.append(node)
    # In sys.modules, because dataclasses and type hints look their module up there.
    sys.modules[name] = light
    try:
        exec(compile(ast.Module(body, type_ignores=[]), str(file), "exec"), light.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
