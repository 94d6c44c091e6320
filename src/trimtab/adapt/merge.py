"""Merging: new weights W' = W + ΔW beside the base, and an audit of what rounding made of the change.

The base is never written. A merge puts new tensors in the model's place for the old ones, and unmerging puts the
old ones back, which is exact in every dtype.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, adapters, set_active, state_of
from trimtab.adapt.module import Adapted, carried, put, restore_module
from trimtab.adapt.probe import Outputs, compare, run_probes
from trimtab.adapt.select import shared_parameters
from trimtab.errors import TrimtabError, UsageError

log = logging.getLogger("trimtab")


@dataclasses.dataclass(frozen=True)
class LayerAudit:
    """What a merge did to one weight. Norms are Frobenius norms, computed in fp32.

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
            f"{mean['unchanged_share']:.1%} of weights unchanged by rounding, rounding error {mean['error_share']:.2%} of ΔW"
        )
        if self.max_logit_difference is not None:
            text += f"; largest output difference {self.max_logit_difference:.2g}"
        if self.greedy_agreement is not None:
            text += f", same greedy token at {self.greedy_agreement:.1%} of {self.probe_positions} probe positions"
        return text


@dataclasses.dataclass
class Merged:
    """Which adapters are in the weights, and what to put back to take them out."""

    names: tuple[str, ...]
    originals: list[tuple[nn.Module, str, Any]]
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
    equal the base, UsageError when the weight is tied to a module outside the adapter.
    """
    model, state = adapter.model, state_of(adapter.model)
    already = state.merged.names if state.merged else ()
    if adapter.name in already:
        raise UsageError(f"adapter '{adapter.name}' is merged already")
    _refuse_tied(adapter)
    before, names = state.active, (*already, adapter.name)
    set_active(model, names)
    wanted = run_probes(model, tokenizer, probes)
    _take_out(model)
    try:
        layers = _put_in(model, names, dtype)
        if not any(x.realised_share > 0 for x in layers) and not _copies_differ(adapter):
            raise MergeError(_nothing_changed(adapter, layers))
    except Exception:
        _take_out(model)
        if already:
            _put_in(model, already, dtype)
        set_active(model, before)
        raise
    set_active(model, names)
    got = run_probes(model, tokenizer, probes)
    set_active(model, (*names, *(n for n in before if n not in names)))
    return _audit(adapter, layers, dtype, wanted, got)


@torch.no_grad()
def unmerge(adapter: Adapter) -> None:
    """Put the base's own weight tensors back: exact in every dtype. Other merged adapters stay merged."""
    state = state_of(adapter.model)
    if state.merged is None or adapter.name not in state.merged.names:
        raise UsageError(f"adapter '{adapter.name}' is not merged")
    rest = tuple(n for n in state.merged.names if n != adapter.name)
    _take_out(adapter.model)
    if rest:
        _put_in(adapter.model, rest, None)
    set_active(adapter.model, state.active)


def _refuse_tied(adapter: Adapter) -> None:
    shared = shared_parameters(adapter.model)
    for path, module in adapter.sites.items():
        others = [p for p, _ in shared.get(id(module._parameters.get("weight")), ()) if p != path]
        if path in adapter.deltas and others:
            raise UsageError(
                f"{path} shares its weight with {others[0]}: merging would change both or untie them. Keep the adapter "
                f"unmerged, or leave {path} out of its targets"
            )


def _changed(adapter: Adapter) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """(module, path, parameter name, source) of everything an adapter changes; source is a Delta or a copy."""
    for path, delta in adapter.deltas.items():
        yield adapter.sites[path], path, "weight", delta
    for path, copy in adapter.copies.items():
        for name, tensor in (*copy._parameters.items(), *copy._buffers.items()):
            yield adapter.sites[path], path, name, tensor


def _put_in(model: nn.Module, names: tuple[str, ...], dtype: torch.dtype | None) -> list[LayerAudit]:
    """Replace every changed tensor, and with a dtype every other tensor too. Figures are of the last adapter's ΔW."""
    state, known = state_of(model), adapters(model)
    merged = state.merged = Merged(names, [], [])
    base: dict[tuple[int, str], Tensor] = {}
    new: dict[tuple[int, str], tuple[nn.Module, Tensor]] = {}
    layers: list[LayerAudit] = []
    for name in names:
        for module, path, parameter, source in _changed(known[name]):
            key = (id(module), parameter)
            old = module._parameters.get(parameter)
            old = module._buffers[parameter] if old is None else old
            assert old is not None
            base.setdefault(key, old)
            if isinstance(source, Tensor):
                new[key] = (module, source.to(dtype or old.dtype) if old.is_floating_point() else source)
                continue
            change = source.layout.shaped(source.weight_change(base[key]), base[key])
            sum_so_far = new[key][1].float() if key in new else base[key].float()
            new[key] = (module, (sum_so_far + change).to(dtype or old.dtype))
            if name == names[-1]:
                layers.append(_layer_audit(path, base[key], sum_so_far, change, new[key][1]))
    for (_, parameter), (module, tensor) in new.items():
        _replace(merged, module, parameter, tensor)
    if dtype is not None:
        _cast_rest(model, merged, dtype, {(id(m), p) for (_, p), (m, _) in new.items()})
    _strip(merged, known, names)
    return layers


def _layer_audit(path: str, base: Tensor, before: Tensor, change: Tensor, new: Tensor) -> LayerAudit:
    realised, size = new.float() - before, change.norm().item()
    touched = change != 0
    count = int(touched.sum())
    unchanged = ((realised == 0) & touched).sum().item() / count if count else 1.0
    error = (realised - change).norm().item()
    norm = base.float().norm().item()
    return LayerAudit(
        path,
        size / norm if norm else float("inf") if size else 0.0,
        unchanged,
        realised.norm().item() / size if size else 0.0,
        error / size if size else 0.0,
    )


def _replace(merged: Merged, module: nn.Module, name: str, tensor: Tensor) -> None:
    is_parameter = name in module._parameters
    holder: dict[str, Any] = module._parameters if is_parameter else module._buffers
    merged.originals.append((module, name, holder[name]))
    holder[name] = nn.Parameter(tensor.detach().clone(), requires_grad=False) if is_parameter else tensor.clone()


def _cast_rest(model: nn.Module, merged: Merged, dtype: torch.dtype, done: set[tuple[int, str]]) -> None:
    own = {
        id(m)
        for adapter in adapters(model).values()
        for part in (adapter.deltas, adapter.copies)
        for root in cast("Mapping[str, nn.Module]", part).values()
        for m in root.modules()
    }
    cast_once: dict[int, Any] = {}
    for module in model.modules():
        if id(module) in own:
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or (id(module), name) in done or tensor.dtype == dtype or not tensor.is_floating_point():
                continue
            holder: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            merged.originals.append((module, name, tensor))
            if id(tensor) not in cast_once:  # tied tensors stay tied
                wide = tensor.detach().to(dtype)
                cast_once[id(tensor)] = (
                    nn.Parameter(wide, requires_grad=False) if holder is module._parameters else wide
                )
            holder[name] = cast_once[id(tensor)]


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
    for module, name, tensor in reversed(state.merged.originals):
        (module._parameters if name in module._parameters else module._buffers)[name] = tensor
    stripped = {id(module) for module in state.merged.stripped}
    for name, adapter in state.adapters.items():
        for path, module in adapter.sites.items():
            if id(module) in stripped:
                device = cast("Tensor", next(iter(module._parameters.values()))).device
                delta, copies = adapter.deltas.get(path), adapter.copies.get(path)
                put(module, name, delta and delta.to(device), copies and copies.to(device))
    state.merged = None


def _copies_differ(adapter: Adapter) -> bool:
    for module, name, tensor in cast("Merged", state_of(adapter.model).merged).originals:
        now = module._parameters.get(name)
        now = module._buffers.get(name) if now is None else now
        if now is not None and now.dtype == tensor.dtype and not torch.equal(now, tensor):
            return True
    return False


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
    used = dtype or next((adapter.sites[p].weight.dtype for p in adapter.deltas), None)  # type: ignore[union-attr]
    name = str(used).removeprefix("torch.") if used is not None else "the model's dtype"
    audit = MergeAudit(adapter.name, name, tuple(layers), difference, agreement, positions, wanted.kind)
    log.info("%s", audit.summary())
    return audit


def save_merged(model: nn.Module, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write a merged transformers model as a folder that plain transformers loads, with its tokenizer and chat template.

    Atomic: the folder appears whole or not at all. Raises UsageError when nothing is merged or the folder exists.
    """
    state = state_of(model)
    if state.merged is None:
        raise UsageError("nothing is merged: call merge(adapter) first")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty: choose another folder")
    weights = {k: v for k, v in model.state_dict().items() if ".deltas." not in k and ".copies." not in k}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        cast("Any", model).save_pretrained(partial, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder
