"""What a change to a weight is: one file per method, and this registry.

A new method is one new file here and one line in METHODS.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, cast

from trimtab.deltas.method import Method
from trimtab.errors import UsageError, did_you_mean
from trimtab.options import from_mapping

METHODS: dict[str, str] = {
    "lora": "trimtab.deltas.lora:LoRA",
    "full": "trimtab.deltas.full:Full",
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


def method_spec(name: str) -> type[Method]:
    """The dataclass of a method without the deltas beside it, and so without importing torch.

    For `--help` and `list`, which must answer at once: only the class statement of the method's file is run,
    after those imports that do not lead to torch. Its fields and docstring are the real ones.
    """
    module, cls = _place(name)
    if f"{module}:spec" in sys.modules:
        return cast("type[Method]", getattr(sys.modules[f"{module}:spec"], cls))
    package, _, _ = module.rpartition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return method_class(name)
    file = Path(spec.submodule_search_locations[0]) / f"{module.rpartition('.')[2]}.py"
    light = {"trimtab.deltas.method", "trimtab.errors", "trimtab.options", "trimtab.patterns"}
    light |= {"__future__", "dataclasses", "typing", "collections.abc", "math"}
    body: list[ast.stmt] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        imports = isinstance(node, ast.Import) and all(a.name in light for a in node.names)
        imports_from = isinstance(node, ast.ImportFrom) and node.module in light
        if imports or imports_from or (isinstance(node, ast.ClassDef) and node.name == cls):
            body.append(node)
    # In sys.modules, because dataclasses and type hints look their module up there.
    light_module = sys.modules[f"{module}:spec"] = types.ModuleType(f"{module}:spec")
    exec(compile(ast.Module(body, type_ignores=[]), str(file), "exec"), light_module.__dict__)
    return cast("type[Method]", getattr(light_module, cls))
