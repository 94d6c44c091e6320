"""Which modules of a model a method goes to. Selection is never silent: what matches nothing is an error."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from trimtab.adapt.module import Adapted
from trimtab.deltas.layout import Layout, layout_of, original_class
from trimtab.errors import UsageError
from trimtab.patterns import matches

log = logging.getLogger("trimtab")
ALL_LINEAR = "all-linear"
ALL_BIASED = "all-biased"
BIASES = {"none": "none", "all": "all", "adapter-only": "lora_only"}
"""The values of `Placement.bias`, and what PEFT calls each."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a method goes, as the user wrote it.

    targets: "all-linear", "all-biased", names, globs or `re:` patterns. exclude: patterns taken out again. bias: none,
    all (every bias of the model) or adapter-only (those of the chosen modules). extra_modules: modules trained whole
    beside the method, such as a fresh head. slices: parts of fused projections, by pattern; a tuple of
    flags, one for each equal part: (True, False, True) adapts q and v of a fused qkv.
    """

    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    bias: str = "none"
    extra_modules: tuple[str, ...] = ()
    slices: Mapping[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight to adapt."""

    path: str
    module: nn.Module
    layout: Layout


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base by path, each once, in the model's order; what adapters put among them left out."""
    # Walked by hand: named_modules() costs more the deeper a model is, and attaching is to take milliseconds.
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[path] = module
        if not module._modules:
            continue
        prefix, own = f"{path}." if path else "", ("deltas", "copies") if isinstance(module, Adapted) else ()
        inner = [
            (prefix + name, child) for name, child in module._modules.items() if child is not None and name not in own
        ]
        stack.extend(reversed(inner))
    return found


def base_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of the base, each once. modules: those of `base_modules`."""
    held = (p for module in modules for p in module._parameters.values() if p is not None)
    return list({id(parameter): parameter for parameter in held}.values())


def adaptable(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Site], dict[str, str]]:
    """(sites by path, reasons by path): what can be adapted, and why a module with a weight cannot.

    modules: those of `base_modules`.
    """
    sites: dict[str, Site] = {}
    refused: dict[str, str] = {}
    unseen = read_past_forward(modules.values())
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        layout = layout_of(module)
        if module in unseen:
            refused[path] = f"is inside a {unseen[module]}, which reads its weight without calling it"
        elif "forward" in module.__dict__:
            refused[path] = "has a forward of its own, put over its class's (by a hook?), which hides an adapted one"
        elif layout is None:
            wrong = "is not a linear, convolution or embedding layer"
            if isinstance(module, nn.Linear):
                wrong = "computes otherwise than a linear layer (is it quantised?)"
            refused[path] = f"is a {original_class(module).__name__}, which {wrong}"
        elif not weight.is_floating_point() or weight.itemsize < 2:
            refused[path] = f"holds {weight.dtype} numbers: load the model in a floating-point dtype of 16 bits or more"
        else:
            sites[path] = Site(path, module, layout)
    return sites, refused


def read_past_forward(modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """Modules whose parent computes with their weights directly, so that a change there would do nothing."""
    parents = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return {
        module: original_class(parent).__name__
        for parent in modules
        if isinstance(parent, parents)
        for module in parent.modules()
        if module is not parent
    }


def choose(
    model: nn.Module, modules: Mapping[str, nn.Module], targets: Sequence[str], exclude: Sequence[str] = ()
) -> list[Site]:
    """The sites that `targets` name and `exclude` does not, in the model's order. UsageError names what is wrong.

    modules: those of `base_modules(model)`.
    """
    sites, refused = adaptable(modules)
    chosen: set[str] = set()
    for target in targets:
        found = _found(target, model, sites)
        if not found:
            raise UsageError(_no_match(target, modules, sites, refused))
        blocked = [p for p in refused if target != ALL_LINEAR and p and matches(target, p)]
        if blocked and not target.startswith("re:") and not any(c in target for c in "*?["):
            raise UsageError(f"target '{target}' names {blocked[0]}, which {refused[blocked[0]]}")
        chosen.update(found)
    for pattern in exclude:
        out = [p for p in chosen if matches(pattern, p)]
        if not out:
            raise UsageError(
                f"exclude '{pattern}' takes out none of the {len(chosen)} chosen modules{_near(pattern, chosen)}"
            )
        chosen.difference_update(out)
    if not chosen:
        raise UsageError("the targets and exclusions leave no module to adapt")
    for path in sorted(refused) if ALL_LINEAR in targets else ():
        if isinstance(modules[path], nn.Linear):
            log.warning("%s is left out of all-linear: it %s", path, refused[path])
    return [site for path, site in sites.items() if path in chosen]


def present(patterns: Sequence[str], modules: Mapping[str, nn.Module], method: str) -> tuple[str, ...]:
    """Those of a method's default targets that a model has. UsageError when it has none of them.

    modules: those of `base_modules`.
    """
    if {ALL_LINEAR, ALL_BIASED} & set(patterns):
        return tuple(patterns)
    sites, _ = adaptable(modules)
    found = tuple(pattern for pattern in patterns if any(matches(pattern, path) for path in sites))
    if not found:
        usual = ", ".join(pattern for pattern in patterns if not pattern.startswith("re:"))
        names = _listed(list(dict.fromkeys(path.rpartition(".")[2] for path in sites)))
        raise UsageError(f"method '{method}' goes to {usual} by default, and this model has none: name targets{names}")
    return found


def _found(target: str, model: nn.Module, sites: dict[str, Site]) -> list[str]:
    """The paths of the sites that one target names."""
    if target == ALL_LINEAR:
        return _linear_paths(model, sites)
    if target == ALL_BIASED:
        return [path for path in _linear_paths(model, sites) if sites[path].layout.bias]
    return [path for path in sites if matches(target, path)]


def _linear_paths(model: nn.Module, sites: dict[str, Site]) -> list[str]:
    """Every linear layer but the output head: the head's weight is often tied, and a fresh one is trained whole."""
    heads = head_modules(model)
    return [p for p, s in sites.items() if s.layout.kind in ("linear", "conv1d-transposed") and s.module not in heads]


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embeddings of a transformers model; None for a model that has none, or does not know them."""
    try:
        found: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    return found


def head_modules(model: nn.Module) -> set[nn.Module]:
    """The output embeddings of a transformers model, and the classification heads of one."""
    heads: set[nn.Module | None] = {output_head(model)}
    if any(task in type(model).__name__ for task in ("Classification", "QuestionAnswering", "MultipleChoice")):
        for name in ("score", "classifier", "qa_outputs", "classification_head"):
            head = getattr(model, name, None)
            heads.update(head.modules() if isinstance(head, nn.Module) else ())
    return {h for h in heads if h is not None}


def _no_match(target: str, modules: Mapping[str, nn.Module], sites: dict[str, Site], refused: dict[str, str]) -> str:
    if target == ALL_BIASED:
        return f"target '{ALL_BIASED}': no linear layer of this model has a bias, its head aside"
    for path in refused if target == ALL_LINEAR else ():
        if isinstance(modules[path], nn.Linear):
            return f"target '{ALL_LINEAR}' matches no module that can be adapted: {path} {refused[path]}"
    for path in refused:
        if path and matches(target, path):
            return f"target '{target}' names {path}, which {refused[path]}"
    for path, module in modules.items():
        if path and matches(target, path):
            inside = sorted({p.rpartition(".")[2] for p in sites if p.startswith(path + ".")})
            hint = f"; name its layers: {', '.join(inside)}" if inside else ""
            return f"target '{target}' names {path} ({type(module).__name__}), which has no weight to adapt{hint}"
    return f"target '{target}' matches no module{_near(target, sites)}"


def _near(pattern: str, paths: Iterable[str]) -> str:
    """The closest module names, or all there are when none is close."""
    names = list(dict.fromkeys(p.rpartition(".")[2] for p in paths))
    near = difflib.get_close_matches(pattern.removeprefix("re:").rpartition(".")[2], names, n=3, cutoff=0.4)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return _listed(names)


def near_paths(pattern: str, paths: Iterable[str]) -> str:
    """'; did you mean X?' with the paths closest to a pattern, or the outermost modules when none is close."""
    first: dict[str, str] = {}  # of the modules that a name ends, as in 24 alike layers, the first one
    for path in filter(None, paths):
        first.setdefault(path.rpartition(".")[2], path)
    named = {name: path for name, path in first.items() if not name.isdigit()}
    last = pattern.removeprefix("re:").rpartition(".")[2]
    near = [named[name] for name in difflib.get_close_matches(last, list(named), n=3, cutoff=0.5)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return _listed(sorted(named.values(), key=lambda path: path.count(".")))


def _listed(names: Sequence[str]) -> str:
    return f"; there are: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}" if names else ""


def shared_parameters(modules: Mapping[str, nn.Module]) -> dict[int, list[tuple[str, str]]]:
    """id of each parameter that several modules hold → [(module path, parameter name)]: the tied weights.

    modules: those of `base_modules`.
    """
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((path, name))
    return {key: where for key, where in holders.items() if len(where) > 1}
