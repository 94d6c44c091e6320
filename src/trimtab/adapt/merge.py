"""Merging: new weights W' = W + ΔW beside the base, and an audit of what rounding made of the change.

The base is never written. A merge puts new tensors in the model's place for the old ones, and unmerging puts the
old ones back, which is exact in every dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, adapters, own_state, set_active, state_of
from trimtab.adapt.attach import tensor_of
from trimtab.adapt.module import Adapted, carried, device_of, put, restore_module
from trimtab.adapt.probe import Outputs, compare, run_probes
from trimtab.adapt.select import base_modules, shared_parameters
from trimtab.deltas.delta import Delta, wide
from trimtab.errors import TrimtabError, UsageError
from trimtab.files import disk_errors, whole_folder
from trimtab.quiet import quiet


@dataclasses.dataclass(frozen=True)
class LayerAudit:
    """What a merge did to one weight. Norms are Frobenius norms, computed in fp32; W is the weight in the merged dtype.

    relative_change: ‖ΔW‖/‖W‖. unchanged_share: share of the weights with a change that rounding left as they were.
    realised_share: ‖W' − W‖/‖ΔW‖. error_share: ‖(W' − W) − ΔW‖/‖ΔW‖.
    """

    name: str
    relative_change: float
    unchanged_share: float
    realised_share: float
    error_share: float


@dataclasses.dataclass(frozen=True)
class MergeAudit:
    """What a merge came to: weights layer by layer, and outputs on probes (None where none could be run).

    dtype: of the merged weights. max_logit_difference: largest absolute difference between the merged and the
    unmerged model's outputs. greedy_agreement: share of probe positions at which both pick the same token.
    """

    adapter: str
    dtype: str
    layers: tuple[LayerAudit, ...]
    max_logit_difference: float | None
    greedy_agreement: float | None
    probe_positions: int
    probe_kind: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "layers": [dataclasses.asdict(layer) for layer in self.layers]}

    def summary(self) -> str:
        """One line with the figures that decide whether to trust the merge."""
        if not self.layers:
            return f"merged into {self.dtype}: trained copies only"
        mean = {
            f: sum(getattr(x, f) for x in self.layers) / len(self.layers) for f in ("unchanged_share", "error_share")
        }
        changes = sorted(x.relative_change for x in self.layers)
        text = (
            f"merged {len(self.layers)} weights into {self.dtype}: ‖ΔW‖/‖W‖ median {changes[len(changes) // 2]:.2%}, "
            f"{mean['unchanged_share']:.1%} of weights unchanged by rounding, "
            f"rounding error {mean['error_share']:.2%} of ΔW"
        )
        if self.max_logit_difference is not None:
            text += f"; largest output difference {self.max_logit_difference:.2g}"
        if self.greedy_agreement is not None:
            text += f", same greedy token at {self.greedy_agreement:.1%} of {self.probe_positions} probe positions"
        return text


@dataclasses.dataclass
class Merged:
    """Which adapters are in the weights, in which dtype (None: each weight's own), and what to put back.

    originals: (module, name, the base's own tensor, dtype of the tensor that stands in its place).
    """

    names: tuple[str, ...]
    dtype: torch.dtype | None
    originals: list[tuple[nn.Module, str, Any, torch.dtype]]
    stripped: list[nn.Module]


class MergeError(TrimtabError):
    """A merge that would be useless or wrong. The model is as it was before."""


@torch.no_grad()
def merge(
    adapter: Adapter,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    probes: Sequence[Any] | None = None,
) -> MergeAudit:
    """Put W + ΔW in place of each adapted weight, and audit it. `unmerge` puts W back, bit for bit.

    dtype: of the whole merged model; None keeps each weight's own. float32 loses nothing of ΔW. tokenizer: for
    probe prompts in words; without it seeded token numbers serve. probes: inputs for models that are not
    transformers', each a tensor, tuple or mapping given to the model. Raises MergeError when the merged weights
    equal the base, UsageError when the weight is tied to a module outside the adapter, or when the model was cast since
    an earlier merge.
    """
    state, model = own_state(adapter), adapter.model
    already, earlier = (state.merged.names, state.merged.dtype) if state.merged else ((), None)
    if adapter.name in already:
        raise UsageError(f"adapter '{adapter.name}' is merged already")
    _refuse_branch(adapter)
    _refuse_tied(adapter)
    _refuse_cast(model, state.merged)
    before, names, dtype = state.active, (*already, adapter.name), dtype or earlier
    try:
        set_active(model, names)
        wanted = run_probes(model, tokenizer, probes)
        _take_out(model)
        layers = _put_in(model, names, dtype)
        if not any(x.realised_share > 0 for x in layers) and not _copies_differ(adapter, dtype):
            raise MergeError(_nothing_changed(adapter, layers))
        set_active(model, names)
        got = run_probes(model, tokenizer, probes)
    except BaseException:
        _take_out(model)
        if already:
            _put_in(model, already, earlier)
        set_active(model, before)
        raise
    set_active(model, (*names, *(n for n in before if n not in names)))
    return _audit(adapter, layers, dtype, wanted, got)


@torch.no_grad()
def unmerge(adapter: Adapter) -> None:
    """Put the base's own weight tensors back: exact in every dtype. Other merged adapters stay merged.

    Raises UsageError when the adapter is not merged, or when the model was cast to another dtype since; nothing is
    changed then.
    """
    state = own_state(adapter)
    if state.merged is None or adapter.name not in state.merged.names:
        raise UsageError(f"adapter '{adapter.name}' is not merged")
    _refuse_cast(adapter.model, state.merged)
    rest, dtype = tuple(n for n in state.merged.names if n != adapter.name), state.merged.dtype
    _take_out(adapter.model)
    if rest:
        _put_in(adapter.model, rest, dtype)
    set_active(adapter.model, state.active)


def _refuse_cast(model: nn.Module, merged: Merged | None) -> None:
    """A merged model that was cast would be half of one dtype and half of another with the base's tensors back."""
    for module, name, original, dtype in merged.originals if merged else ():
        now = cast("Tensor", tensor_of(module, name)).dtype
        if now != dtype:
            path = next(p for p, m in base_modules(model).items() if m is module)
            raise UsageError(
                f"{path}.{name} was {dtype} when it was merged and is {now} now, so the model was cast since; the "
                f"base's own is {original.dtype}, and the two would mix. Cast the model back, model.to({dtype}), first"
            )


def _refuse_branch(adapter: Adapter) -> None:
    if not adapter.method.mergeable:
        raise UsageError(
            f"method '{adapter.method.name}' computes beside the weights what no weights can "
            f"({adapter.method.formula}), so it cannot be merged: keep the adapter"
        )


def _refuse_tied(adapter: Adapter) -> None:
    shared = shared_parameters(base_modules(adapter.model))
    for path, module in adapter.sites.items():
        alike = adapter.deltas if adapter.method.shared else (path,)  # one change for all that a weight is tied to
        others = [p for p, _ in shared.get(id(module._parameters.get("weight")), ()) if p not in alike]
        if path in adapter.deltas and others:
            raise UsageError(
                f"{path} shares its weight with {others[0]}: merging would change both or untie them. Keep the adapter "
                f"unmerged, or leave {path} out of its targets"
            )


@dataclasses.dataclass
class _Change:
    """What becomes of one tensor of the base: a trained copy may replace it, and deltas change it."""

    path: str
    module: nn.Module
    name: str
    copy: Tensor | None = None
    deltas: list[tuple[str, Delta]] = dataclasses.field(default_factory=list)

    @property
    def base(self) -> Tensor:
        return cast("Tensor", tensor_of(self.module, self.name))


def _changes(known: Mapping[str, Adapter], names: tuple[str, ...]) -> list[_Change]:
    found: dict[tuple[str, str], _Change] = {}
    for name in names:
        adapter = known[name]
        for path, delta in adapter.deltas.items():
            module = adapter.sites[path]
            if delta.changes_weight:
                change = found.setdefault((path, "weight"), _Change(path, module, "weight"))
                change.deltas.append((name, delta))
            if _bias_change(path, module, delta) is not None:
                bias = found.setdefault((path, "bias"), _Change(path, module, "bias"))
                bias.deltas.append((name, delta))
        for path, copies in adapter.copies.items():
            for own, tensor in (*copies._parameters.items(), *copies._buffers.items()):
                found.setdefault((path, own), _Change(path, adapter.sites[path], own)).copy = tensor
    return list(found.values())


def _bias_change(path: str, module: nn.Module, delta: Delta) -> Tensor | None:
    """Δb of a module. MergeError where there is no b to put it in."""
    bias = tensor_of(module, "bias")
    change = delta.bias_change(bias)
    if change is not None and bias is None:
        raise MergeError(f"{path} has no bias that method '{delta.method.name}' could be merged into: keep it unmerged")
    return change


def _put_in(model: nn.Module, names: tuple[str, ...], dtype: torch.dtype | None) -> list[LayerAudit]:
    """Replace every changed tensor, and with a dtype every other tensor too. Figures are of the last adapter's ΔW."""
    state, known = state_of(model), adapters(model)
    merged = state.merged = Merged(names, dtype, [], [])
    layers: list[LayerAudit] = []
    placed: dict[int, Tensor] = {}
    done: set[tuple[int, str]] = set()
    for change in _changes(known, names):
        done.add((id(change.module), change.name))
        source = change.base if change.deltas else cast("Tensor", change.copy)
        if id(source) not in placed:  # what is tied stays tied
            if change.deltas:
                placed[id(source)], audits = _summed(change, dtype)
                layers += [audit for name, audit in audits if name == names[-1]]
            else:
                placed[id(source)] = _as_held(_in_dtype(source, change.base, dtype).clone(), source)
        _replace(merged, change.module, change.name, placed[id(source)])
    if dtype is not None:
        _cast_rest(model, merged, dtype, done)
    _strip(merged, known, names)
    return layers


def _in_dtype(tensor: Tensor, like: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to((dtype or like.dtype) if like.is_floating_point() else like.dtype)


def _summed(change: _Change, dtype: torch.dtype | None) -> tuple[Tensor, list[tuple[str, LayerAudit]]]:
    """W plus all its changes, added in fp32 and rounded once, and what rounding made of each of them."""
    start = change.base if change.copy is None else change.copy
    total, audits = wide(start), []
    for name, delta in change.deltas:
        if change.name == "weight":
            step = delta.layout.shaped(delta.weight_change(start), start)
        else:
            step = cast("Tensor", delta.bias_change(start))
        before, total = total, total + step
        rounded = [_in_dtype(t, change.base, dtype) for t in (before, total)]
        place = change.path if change.name == "weight" else f"{change.path}.{change.name}"
        audits.append((name, _layer_audit(place, rounded[0], rounded[1], step)))
    return _as_held(_in_dtype(total, change.base, dtype), change.base), audits


def _as_held(tensor: Tensor, like: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if isinstance(like, nn.Parameter) else tensor


def _layer_audit(path: str, before: Tensor, after: Tensor, change: Tensor) -> LayerAudit:
    """before, after: the weight without and with the change, both rounded to the merged dtype."""
    realised, size, norm = wide(after) - wide(before), change.norm().item(), wide(before).norm().item()
    touched = change != 0
    count = int(touched.sum())
    return LayerAudit(
        path,
        size / norm if norm else float("inf") if size else 0.0,
        int(((realised == 0) & touched).sum()) / count if count else 1.0,
        realised.norm().item() / size if size else 0.0,
        (realised - change).norm().item() / size if size else 0.0,
    )


def _replace(merged: Merged, module: nn.Module, name: str, tensor: Tensor) -> None:
    holder: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    merged.originals.append((module, name, holder[name], tensor.dtype))
    holder[name] = tensor


def _cast_rest(model: nn.Module, merged: Merged, dtype: torch.dtype, done: set[tuple[int, str]]) -> None:
    """Cast everything that a checkpoint holds; what is computed, such as rotary frequencies, keeps its precision."""
    cast_once: dict[int, Tensor] = {}
    for module in base_modules(model).values():
        lasting = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        for name in (*module._parameters, *lasting):
            tensor = tensor_of(module, name)
            if tensor is None or (id(module), name) in done or tensor.dtype == dtype or not tensor.is_floating_point():
                continue
            if id(tensor) not in cast_once:  # tied tensors stay tied
                cast_once[id(tensor)] = _as_held(tensor.detach().to(dtype), tensor)
            _replace(merged, module, name, cast_once[id(tensor)])


def _strip(merged: Merged, known: dict[str, Adapter], names: tuple[str, ...]) -> None:
    """Give modules that carry nothing but merged deltas their own class back: merged inference costs nothing."""
    for name in names:
        for module in known[name].sites.values():
            if isinstance(module, Adapted) and carried(module) <= set(names):
                restore_module(cast("nn.Module", module))
                merged.stripped.append(cast("nn.Module", module))


def _take_out(model: nn.Module) -> None:
    """Undo whatever is merged: the original tensors, classes and deltas."""
    state = state_of(model)
    if state.merged is None:
        return
    for module, name, tensor, _ in reversed(state.merged.originals):
        holder: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        if tensor.device != holder[name].device:  # the merged model was moved
            tensor.data = tensor.data.to(holder[name].device)
        holder[name] = tensor
    stripped = {id(module) for module in state.merged.stripped}
    for name, adapter in state.adapters.items():
        for path, module in adapter.sites.items():
            if id(module) in stripped:
                device = device_of(module)
                delta, copies = adapter.deltas.get(path), adapter.copies.get(path)
                put(module, name, delta and delta.to(device), copies and copies.to(device))
    state.merged = None


def _copies_differ(adapter: Adapter, dtype: torch.dtype | None) -> bool:
    """Whether a trained copy of this adapter differs from the base's own tensor, both in the merged dtype."""
    originals = {(id(m), n): t for m, n, t, _ in cast("Merged", state_of(adapter.model).merged).originals}
    return any(
        not torch.equal(_in_dtype(tensor, base, dtype), _in_dtype(base, base, dtype))
        for path, copies in adapter.copies.items()
        for name, tensor in copies.state_dict().items()
        for base in (originals[id(adapter.sites[path]), name],)
    )


def _nothing_changed(adapter: Adapter, layers: list[LayerAudit]) -> str:
    if any(layer.relative_change > 0 for layer in layers):
        return (
            f"merging '{adapter.name}' leaves every weight as it is: its change is too small for this dtype. "
            "Merge with dtype=torch.float32 (--dtype float32)"
        )
    return f"merging '{adapter.name}' leaves every weight as it is: the adapter's change is zero (was it trained?)"


def _audit(
    adapter: Adapter, layers: list[LayerAudit], dtype: torch.dtype | None, wanted: Outputs, got: Outputs
) -> MergeAudit:
    difference, agreement, positions = compare(wanted, got)
    used = dtype or next((adapter.sites[p].weight.dtype for p in adapter.deltas), None)
    name = str(used).removeprefix("torch.") if used is not None else "the model's dtype"
    audit = MergeAudit(adapter.name, name, tuple(layers), difference, agreement, positions, wanted.kind)
    return audit


def save_merged(model: nn.Module, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write a merged transformers model as a folder that plain transformers loads, with tokenizer and chat template.

    Atomic: the folder appears whole or not at all. Raises UsageError when nothing is merged or the folder exists.
    """
    if state_of(model).merged is None:
        raise UsageError("nothing is merged: call merge(adapter) first")
    if not hasattr(model, "save_pretrained"):
        raise UsageError(f"a {type(model).__name__} has no save_pretrained: save its state_dict() instead")
    own = tuple(
        f"{path}.{part}."
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Adapted)
        for part in ("deltas", "copies")
    )
    weights = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(own)}
    with whole_folder(folder) as partial:
        with quiet(), disk_errors(partial):
            cast("Any", model).save_pretrained(partial, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return Path(folder)
