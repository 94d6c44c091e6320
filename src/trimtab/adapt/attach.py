"""Attach a method to a model: choose the modules, give each its delta, freeze the base."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import STATE, Adapter, ModelState, frozen_norm_class, set_active
from trimtab.adapt.frozen_head import even_rows_for_head
from trimtab.adapt.module import Copies, device_of, freeze_statistics, put, refuse_clash
from trimtab.adapt.prompt_trial import fitting_sizes
from trimtab.adapt.prompts import Prompt, PromptAdapter, Prompted, backbone_of, make_prompt
from trimtab.adapt.select import (
    BIASES,
    Placement,
    Site,
    base_modules,
    base_parameters,
    choose,
    near_paths,
    present,
    read_past_forward,
    shared_parameters,
)
from trimtab.deltas.delta import Delta
from trimtab.deltas.layout import slice_layout
from trimtab.deltas.method import Method, OnProgress
from trimtab.deltas.method import Site as Part
from trimtab.deltas.sliced import Sliced
from trimtab.deltas.soft_prompt import SoftPrompt
from trimtab.errors import UsageError, did_you_mean
from trimtab.patterns import matches

log = logging.getLogger("trimtab")

WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
"""Classes around a model, and where the model is in them. Paths through them would fit no other tool."""


def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: str | Sequence[str] | None = None,
    name: str = "default",
    seed: int = 0,
    exclude: Sequence[str] = (),
    bias: str = "none",
    extra_modules: Sequence[str] = (),
    slices: Mapping[str, Sequence[bool]] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: OnProgress | None = None,
) -> Adapter:
    """Put a method on a model and enable it (alone); the base is frozen until the last adapter is removed.

    targets: "all-linear" (every linear layer but the output head), "all-biased" (those of them with a bias), names,
    globs or `re:` patterns; None is the method's own, "all-linear" for most, no module for a soft prompt. name:
    letters, digits, - and _. seed: of the random start. bias, extra_modules, slices, exclude: see `Placement`. dtype:
    of everything trained; biases and extra modules are never trained in fewer bits than the base has. progress(done,
    total, text) is told how far a start is that is worked out of the weights. Raises UsageError for a target that
    matches nothing, a rank above a weight's smaller side, a name in use, a wrapped model. Nothing is changed when it
    raises.
    """
    check_name(model, name)
    if isinstance(method, SoftPrompt):
        places = {"targets": targets, "exclude": exclude, "extra_modules": extra_modules, "slices": slices}
        _refuse_places(method, {**places, "bias": bias != "none"})
        return _attach_prompt(model, method, name, seed, dtype)
    modules = base_modules(model)
    if targets is None:
        targets = present(method.default_targets, modules, method.name)
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    flags = {pattern: tuple(bool(f) for f in chosen) for pattern, chosen in (slices or {}).items()}
    placement = Placement(targets, tuple(exclude), bias, tuple(extra_modules), flags)
    adapter = Adapter(model, name, method, placement, {"seed": seed})
    if bias not in BIASES:
        raise UsageError(f"bias is '{bias}', but must be one of {', '.join(BIASES)}{did_you_mean(bias, BIASES)}")
    extra = _extra(modules, placement.extra_modules)
    sites = [s for s in choose(model, modules, targets, exclude) if s.path not in extra]
    if not sites:
        raise UsageError("every target is among the extra modules, which are trained whole already")
    _check_patterns(method, placement, sites)
    _warn_of_tied(modules, sites, method)
    generator = torch.Generator().manual_seed(seed)
    deltas = {site.path: (site.module, fitting_delta(method, placement, site, generator)) for site in sites}
    copied = _copied_names(modules, placement, deltas, extra)
    whole = {path for path, name in copied if path in extra or name != "bias"}
    outer = outermost(whole, {**extra, **dict.fromkeys(whole)})
    parts = parts_of(deltas)
    method.bind(parts)
    method.begin(parts, progress)
    install(adapter, modules, deltas, _make_copies(copied, dtype), dtype, outer)
    if log.isEnabledFor(logging.INFO):
        count, base = (
            sum(p.numel() for p in part) for part in (adapter.parameters(), base_parameters(modules.values()))
        )
        log.info("%s on %d modules: %s parameters beside %s", method.name, len(deltas), f"{count:,}", f"{base:,}")
    return adapter


def _refuse_places(method: SoftPrompt, given: Mapping[str, Any]) -> None:
    wrong = [key for key, value in given.items() if value]
    if wrong:
        raise UsageError(
            f"method '{method.name}' stands before the text and goes to no module: leave out {' and '.join(wrong)}"
        )


def _attach_prompt(model: nn.Module, method: SoftPrompt, name: str, seed: int, dtype: torch.dtype) -> Adapter:
    path, backbone = backbone_of(model, method)
    sizes = fitting_sizes(model, backbone, method)
    words: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    adapter = PromptAdapter(model, name, method, Placement(()), {"seed": seed})
    prompt = make_prompt(method, sizes, words, trained=True, seed=seed)
    install_prompt(adapter, path, backbone, prompt.to(dtype))
    log.info("%s before the text: %s parameters", method.name, f"{sum(p.numel() for p in prompt.parameters()):,}")
    return adapter


def install_prompt(adapter: PromptAdapter, path: str, backbone: nn.Module, prompt: Prompt) -> None:
    """Put a finished soft prompt on the model's backbone, at `path`, and enable it alone."""
    modules = base_modules(adapter.model)
    prompt.to(device_of(backbone))
    put(backbone, adapter.name, prompt, form=Prompted)
    adapter.sites, adapter.prompt = {path: backbone}, prompt
    install(adapter, modules, {}, {}, None, ())


def check_name(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken, or that cannot be a part of a state-dict key."""
    if isinstance(getattr(model, WRAPPERS.get(type(model).__name__, ""), None), nn.Module):
        inner = WRAPPERS[type(model).__name__]
        raise UsageError(f"the model is wrapped in a {type(model).__name__}: adapt model.{inner}, then wrap it")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise UsageError(
            f"adapter name '{name}' cannot be used: take letters, digits, - and _, and no word of Python's dict"
        )
    state: ModelState | None = getattr(model, STATE, None)
    if state is not None and name in state.adapters:
        raise UsageError(f"the model already has an adapter '{name}': choose another name, or remove that one first")
    if state is not None and state.merged is not None:
        raise UsageError(
            f"adapter '{state.merged.names[0]}' is merged into the weights: unmerge it before adding another"
        )


def fitting_delta(method: Method, placement: Placement, site: Site, generator: torch.Generator) -> Delta:
    """A fresh delta that the method says it can be put on. UsageError names the module."""
    delta = fresh_delta(method, placement, site, generator)
    parts: Any = delta.parts if isinstance(delta, Sliced) else [delta]
    for part in parts:
        why = part.method.unfit(part.layout)
        if why is not None:
            raise UsageError(f"{site.path} [{part.layout.out_features}, {part.layout.in_features}]: {why}")
    return delta


def parts_of(deltas: Mapping[str, tuple[nn.Module, Delta]]) -> list[Part]:
    """Every delta with its weight, the parts of a fused projection each for itself. deltas: by module path."""
    weights = {path: cast("Tensor", module.weight).detach() for path, (module, _) in deltas.items()}
    return [part for path, (_, delta) in deltas.items() for part in delta.sites(path, weights[path])]


def fresh_delta(method: Method, placement: Placement, site: Site, generator: torch.Generator) -> Delta:
    """The delta of one site as the placement has it, in fp32 on the CPU. UsageError names the module."""
    resolved = method.at(site.path)
    weight: Tensor = site.module.weight  # type: ignore[assignment]
    flags = next((f for p, f in placement.slices.items() if matches(p, site.path)), None)
    try:
        if flags is None:
            return resolved.delta(site.layout, weight, generator)
        return _sliced(resolved, flags, site, generator)
    except UsageError as error:
        shape = f"[{site.layout.out_features}, {site.layout.in_features}]"
        raise UsageError(f"{site.path} {shape}: {error}") from error


def _sliced(method: Method, flags: tuple[bool, ...], site: Site, generator: torch.Generator) -> Delta:
    layout, weight = site.layout, site.module.weight
    if layout.kind not in ("linear", "conv1d-transposed"):
        raise UsageError(f"slices are for linear layers, and this is a {layout.kind}")
    if not any(flags) or layout.out_features % len(flags):
        raise UsageError(
            f"{layout.out_features} rows cannot be cut into {len(flags)} equal parts with at least one chosen"
        )
    size = layout.out_features // len(flags)
    ranges = tuple((i * size, (i + 1) * size) for i, chosen in enumerate(flags) if chosen)
    matrix = layout.matrix(weight.detach())  # type: ignore[operator]
    parts = [method.delta(slice_layout(layout, a, b), matrix[a:b], generator) for a, b in ranges]
    return Sliced(parts, ranges, layout)


def _check_patterns(method: Method, placement: Placement, sites: list[Site]) -> None:
    for pattern in (*method.patterns(), *placement.slices):
        if not any(matches(pattern, site.path) for site in sites):
            names = sorted({s.path.rpartition(".")[2] for s in sites})
            raise UsageError(
                f"pattern '{pattern}' matches none of the {len(sites)} chosen modules ({', '.join(names[:8])})"
            )


def _warn_of_tied(modules: Mapping[str, nn.Module], sites: Sequence[Site], method: Method) -> None:
    shared, alike = shared_parameters(modules), {site.path for site in sites if method.shared}
    for site in sites:
        holders = [path for path, _ in shared.get(id(site.module._parameters["weight"]), ())]
        others = [path for path in holders if path != site.path and path not in alike]
        if others:
            log.warning(
                "%s shares its weight with %s, which the adapter does not change: merging it will be refused",
                site.path,
                others[0],
            )


def _extra(everything: Mapping[str, nn.Module], patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules to train whole, by path: those named, and every module within them."""
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        roots = [p for p in everything if p and matches(pattern, p)]
        if not roots:
            raise UsageError(f"extra module '{pattern}' matches no module{near_paths(pattern, everything)}")
        within = {p: m for p, m in everything.items() if any(p == r or p.startswith(r + ".") for r in roots)}
        if not any(module._parameters for module in within.values()):
            raise UsageError(f"extra module '{pattern}' names {roots[0]}, which has no parameters to train")
        found.update(within)
    return found


def _copied_names(
    everything: Mapping[str, nn.Module], placement: Placement, deltas: Mapping[str, Any], extra: dict[str, nn.Module]
) -> dict[tuple[str, str], nn.Module]:
    """(module path, parameter or buffer name) of everything that is trained as a copy, with its module."""
    chosen: dict[tuple[str, str], nn.Module] = {}
    if not extra and placement.bias == "none":
        return chosen
    for path, module in extra.items():
        lasting = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
        names = [*module._parameters, *lasting]
        chosen.update({(path, n): module for n in names if tensor_of(module, n) is not None})
    if placement.bias != "none":
        found = _biases(everything, deltas if placement.bias == "adapter-only" else everything, placement.bias)
        own = {path for path, (_, delta) in deltas.items() if not delta.changes_weight}  # their bias is what they train
        chosen.update({(path, name): module for (path, name), module in found.items() if path not in own})
    _add_tied(chosen, everything)
    unseen = read_past_forward(everything.values())
    for (path, name), module in chosen.items():
        if module in unseen:
            raise UsageError(
                f"{path}.{name} cannot be trained as a copy: it is inside a {unseen[module]}, which reads it without "
                "calling the module"
            )
        if name == "weight" and path in deltas:
            raise UsageError(
                f"{path}.weight is tied to a module that is trained whole: leave {path} out of the targets"
            )
    return chosen


def _biases(
    everything: Mapping[str, nn.Module], within: Mapping[str, Any], bias: str
) -> dict[tuple[str, str], nn.Module]:
    found = {(p, "bias"): m for p, m in everything.items() if p in within and m._parameters.get("bias") is not None}
    if not found:
        where = "the model" if bias == "all" else f"none of the {len(within)} chosen modules"
        raise UsageError(f"bias is '{bias}', but {where} has {'no ' if bias == 'all' else 'a '}bias: take bias 'none'")
    return found


def _add_tied(chosen: dict[tuple[str, str], nn.Module], everything: Mapping[str, nn.Module]) -> None:
    """Let every holder of a tied parameter use the one trained copy."""
    shared = shared_parameters(everything)
    for (path, name), module in list(chosen.items()):
        for other, other_name in shared.get(id(module._parameters.get(name)), ()):
            if (other, other_name) not in chosen:
                log.info("%s.%s is tied to %s.%s: both use the one trained copy", path, name, other, other_name)
                chosen[other, other_name] = everything[other]


def tensor_of(module: nn.Module | None, name: str) -> Tensor | None:
    """The parameter or buffer `name` of a module itself, or None."""
    if module is None:
        return None
    found = module._parameters.get(name)
    return found if found is not None else module._buffers.get(name)


def outermost(paths: set[str], within: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the modules `within`, the outermost that hold one of `paths`."""
    holding = {w for w in within if any(p == w or p.startswith(w + ".") for p in paths)}
    return tuple(sorted(w for w in holding if not any(w.startswith(h + ".") for h in holding)))


def as_copy(values: Tensor, base: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A trainable copy of a parameter of the base with these values: in the wider of the base's dtype and `dtype`."""
    # Small steps are lost in bf16, and so would be the base's own digits in a dtype narrower than its.
    kept = torch.promote_types(base.dtype, dtype) if base.is_floating_point() else base.dtype
    return nn.Parameter(values.detach().to(base.device, kept, copy=True))


def _make_copies(copied: dict[tuple[str, str], nn.Module], dtype: torch.dtype) -> dict[str, tuple[nn.Module, Copies]]:
    clones: dict[int, nn.Parameter | Tensor] = {}
    parameters: dict[str, dict[str, nn.Parameter]] = {}
    buffers: dict[str, dict[str, Tensor]] = {}
    for (path, name), module in copied.items():
        source = tensor_of(module, name)
        assert source is not None
        if id(source) not in clones:
            trained = isinstance(source, nn.Parameter)
            clones[id(source)] = as_copy(source, source, dtype) if trained else source.detach().clone()
        copy = clones[id(source)]
        if isinstance(copy, nn.Parameter):
            parameters.setdefault(path, {})[name] = copy
        else:
            buffers.setdefault(path, {})[name] = copy
    modules = {path: module for (path, _), module in copied.items()}
    return {p: (module, Copies(parameters.get(p, {}), buffers.get(p, {}))) for p, module in modules.items()}


def install(
    adapter: Adapter,
    modules: Mapping[str, nn.Module],
    deltas: dict[str, tuple[nn.Module, Delta]],
    copies: dict[str, tuple[nn.Module, Copies]],
    dtype: torch.dtype | None,
    whole: tuple[str, ...],
) -> None:
    """Put finished deltas and copies on the model under the adapter's name, and enable it alone.

    modules: those of `base_modules(adapter.model)`. dtype: of the deltas; None keeps each as it is. whole: paths of the
    modules trained whole.
    """
    model = adapter.model
    for part in (deltas, copies):
        for path, (module, _) in part.items():
            refuse_clash(path, module)
    for module, delta in deltas.values():
        weight: Tensor = module.weight  # type: ignore[assignment]
        if weight.device.type != "cpu" or dtype not in (None, torch.float32):
            delta.to(device=weight.device, dtype=dtype)
    state: ModelState | None = getattr(model, STATE, None)
    if state is None:
        parameters = base_parameters(modules.values())
        state = ModelState({}, [p for p in parameters if p.requires_grad], [])
        even_rows_for_head(model)
        for parameter in parameters:
            parameter.requires_grad_(False)
    for module in modules.values():
        if frozen_norm_class(module):
            freeze_statistics(module)
            state.frozen_norms.append(module)
    for path, (module, delta) in deltas.items():
        put(module, adapter.name, delta=delta)
        adapter.sites[path], adapter.deltas[path] = module, delta
    for path, (module, copy) in copies.items():
        put(module, adapter.name, copies=copy)
        adapter.sites[path], adapter.copies[path] = module, copy
    adapter.whole = whole
    state.adapters[adapter.name] = adapter
    setattr(model, STATE, state)
    set_active(model, (adapter.name,))
