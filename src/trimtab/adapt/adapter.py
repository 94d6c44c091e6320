"""An adapter: a named set of deltas on one model, and the switches between several of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapt.frozen_head import release_head
from trimtab.adapt.module import (
    Adapted,
    Copies,
    FrozenStatistics,
    Routes,
    carried,
    device_of,
    drop,
    release_statistics,
)
from trimtab.adapt.select import Placement
from trimtab.deltas.delta import Delta
from trimtab.deltas.method import Method, OnProgress, Site
from trimtab.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from trimtab.adapt.merge import Merged

STATE = "_trimtab"


@dataclasses.dataclass
class ModelState:
    """What trimtab keeps on an adapted model, as its attribute `_trimtab`; gone with the last adapter."""

    adapters: dict[str, Adapter]
    was_trainable: list[nn.Parameter]
    frozen_norms: list[nn.Module]
    active: tuple[str, ...] = ()
    merged: Merged | None = None


class Adapter:
    """A named set of deltas on one model. Made by `trimtab.attach` and `trimtab.load`.

    method, placement: what the user asked for. provenance: where it came from (base model, seed), saved beside
    it. By module path: sites holds the adapted modules, deltas the delta of each weight, copies the trained
    copies of biases and extra modules. whole: paths of the modules that are trained whole, the outermost ones.
    """

    def __init__(
        self, model: nn.Module, name: str, method: Method, placement: Placement, provenance: dict[str, Any]
    ) -> None:
        self.model = model
        self.name = name
        self.method = method
        self.placement = placement
        self.provenance = provenance
        self.sites: dict[str, nn.Module] = {}
        self.deltas: dict[str, Delta] = {}
        self.copies: dict[str, Copies] = {}
        self.whole: tuple[str, ...] = ()

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"Adapter('{self.name}', {self.method}, {len(self.deltas)} modules, {count:,} parameters)"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(path.parameter, parameter) of everything this adapter trains; a shared copy once."""
        seen: set[int] = set()
        for place, module in self._parts():
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{place}.{name}", parameter

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(place, module) of each delta and of each set of copies; the places differ where a module has both."""
        yield from self.deltas.items()
        yield from ((f"{path}.copy", copies) for path, copies in self.copies.items())

    def parameters(self) -> list[nn.Parameter]:
        """Everything this adapter trains; the base is not among it."""
        return [parameter for _, parameter in self.named_parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to resume, by path: factors, buffers, trained copies. References, not clones."""
        return {f"{place}.{key}": t for place, module in self._parts() for key, t in module.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Write a `state_dict` back in place. UsageError when names, shapes or dtypes differ."""
        own = self.state_dict()
        for key in [*(own.keys() - state.keys()), *(state.keys() - own.keys())][:1]:
            raise UsageError(
                f"the saved state {'lacks' if key in own else 'has a foreign'} '{key}'{did_you_mean(key, own)}"
            )
        for key, tensor in own.items():
            saved, here = [(list(t.shape), t.dtype) for t in (state[key], tensor)]
            if saved != here:
                raise UsageError(
                    f"'{key}' is {saved[0]} in {saved[1]} in the saved state, but {here[0]} in {here[1]} here"
                )
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])

    def weights(self) -> list[Site]:
        """Every delta with the frozen weight it changes; the parts of a fused projection each for itself."""
        found: list[Site] = []
        for path, delta in self.deltas.items():
            found += delta.sites(path, cast("Tensor", self.sites[path].weight).detach())
        return found

    def base_sites(self) -> dict[str, nn.Module]:
        """By path, the modules of the base whose weights tell it from another base."""
        return {path: self.sites[path] for path in self.deltas}

    def prepare(self, steps: int, progress: OnProgress | None = None) -> None:
        """Let the method get ready for a run of `steps` optimizer steps. UsageError when it cannot work in it."""
        self.method.prepare(self.weights(), steps, progress)

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss of an optimizer step; None for nothing."""
        return self.method.penalty(self.weights())

    def after_step(self, step: int) -> list[nn.Parameter]:
        """Tell the method that optimizer step `step` (1 for the first) is done; the gradients must still be there.

        Returns the parameters whose optimizer state is to be forgotten.
        """
        return self.method.after_step(step, self.weights())

    def lr_factors(self) -> dict[nn.Parameter, float]:
        """What the method multiplies the learning rate of each of its parameters by, where that is not 1."""
        found = {}
        for site in self.weights():
            for name, parameter in site.delta.named_parameters():
                factor = self.method.lr_factor(name)
                if factor != 1.0:
                    found[parameter] = factor
        return found

    @property
    def enabled(self) -> bool:
        """Whether the model's forward uses this adapter."""
        return self.name in own_state(self).active

    def enable(self) -> AbstractContextManager[None]:
        """Use this adapter beside those already enabled; as a context manager, until its end."""
        active = own_state(self).active
        return _Switched(self.model, active if self.enabled else (*active, self.name))

    def disable(self) -> AbstractContextManager[None]:
        """Stop using this adapter; as a context manager, until its end."""
        return _Switched(self.model, tuple(n for n in own_state(self).active if n != self.name))

    def save(self, path: str | Path) -> Path:
        """Write the adapter as a folder in PEFT's layout, atomically. Returns the folder."""
        from trimtab.formats.peft_write import save_adapter

        return save_adapter(self, path)

    def remove(self) -> None:
        """Take the adapter off. With the last one gone the model is what it was, bit for bit and class for class."""
        state = own_state(self)
        if state.merged is not None and self.name in state.merged.names:
            raise UsageError(f"adapter '{self.name}' is merged: unmerge it before removing it")
        set_active(self.model, tuple(n for n in state.active if n != self.name))
        for module in self.sites.values():
            drop(module, self.name)
        del state.adapters[self.name]
        self.sites, self.deltas, self.copies, self.whole = {}, {}, {}, ()
        if not state.adapters:
            _release(self.model, state)


class _Switched:
    """A change of the enabled adapters that has happened already, and is undone at the end of a `with`."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.model, self.before = model, state_of(model).active
        set_active(model, names)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        set_active(self.model, tuple(n for n in self.before if n in state_of(self.model).adapters))


def _release(model: nn.Module, state: ModelState) -> None:
    for parameter in state.was_trainable:
        parameter.requires_grad_(True)
    for norm in state.frozen_norms:
        release_statistics(norm)
    release_head(model)
    delattr(model, STATE)


def state_of(model: nn.Module) -> ModelState:
    """The state of an adapted model. UsageError when it has no adapter."""
    state = getattr(model, STATE, None)
    if state is None:
        raise UsageError(f"this {type(model).__name__} has no adapter: attach or load one first")
    return cast("ModelState", state)


def own_state(adapter: Adapter) -> ModelState:
    """The state of an adapter's model. UsageError when the adapter was removed, or is none."""
    if not isinstance(adapter, Adapter):
        raise UsageError(
            f"an adapter is needed here, not a {type(adapter).__name__}: give what attach or load returned, or "
            "trimtab.adapters(model)[name]"
        )
    state: ModelState | None = getattr(adapter.model, STATE, None)
    if state is None or state.adapters.get(adapter.name) is not adapter:
        raise UsageError(f"adapter '{adapter.name}' was removed from its model: attach or load it again")
    return state


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model, by name; empty when there are none."""
    state = getattr(model, STATE, None)
    return dict(state.adapters) if state is not None else {}


def _check(model: nn.Module, names: Sequence[str | None]) -> None:
    known = adapters(model)
    for name in names:
        if name is not None and name not in known:
            raise UsageError(
                f"no adapter '{name}' on this model{did_you_mean(name, known)} (there are: {', '.join(known)})"
            )


def adapted_modules(model: nn.Module) -> list[Adapted]:
    """The modules that carry deltas or copies now, each once; a module with nothing but merged ones carries none."""
    sites = {id(m): m for adapter in adapters(model).values() for m in adapter.sites.values()}
    return [m for m in sites.values() if isinstance(m, Adapted)]


def set_active(model: nn.Module, names: tuple[str, ...]) -> None:
    """Enable exactly these adapters. UsageError when one that is merged into the weights is not among them.

    Nor can two be enabled at once that both have a trained copy of the same parameter.
    """
    state = state_of(model)
    _check(model, names)
    _refuse_two_copies([state.adapters[name] for name in names])
    merged = state.merged.names if state.merged else ()
    for name in merged:
        if name not in names:
            raise UsageError(f"adapter '{name}' is merged into the weights: unmerge it to switch it off")
    for module in adapted_modules(model):
        own = carried(module)
        # Past nn.Module.__setattr__, which is slow.
        vars(module)["_active"] = tuple([n for n in names if n not in merged and n in own])
    state.active = names


def _refuse_two_copies(enabled: Sequence[Adapter]) -> None:
    taken: dict[str, str] = {}
    for adapter in enabled:
        for path, copies in adapter.copies.items():
            for name in (*copies._parameters, *copies._buffers):
                other = taken.setdefault(f"{path}.{name}", adapter.name)
                if other != adapter.name:
                    raise UsageError(
                        f"adapters '{other}' and '{adapter.name}' both replace {path}.{name}: switch to one of them"
                    )


def switch(model: nn.Module, name: str | None) -> None:
    """Use exactly one adapter, by name, or none (the bare base)."""
    set_active(model, () if name is None else (name,))


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block, row i of every batch goes through adapter names[i]; None is the bare base.

    Each group of rows is computed exactly as it would be alone. Every adapted module must get inputs whose
    first dimension is the batch, of len(names) rows.
    """
    state = state_of(model)
    _check(model, names)
    if not names:
        raise UsageError("rows() needs one name for each row of the batch, but was given none")
    if state.merged is not None:
        raise UsageError(
            f"adapter '{state.merged.names[0]}' is merged into the weights: unmerge it before using rows()"
        )
    modules = adapted_modules(model)
    before = [module._routes for module in modules]
    # Once for each device and not once for each call of a module.
    places = [device_of(cast("nn.Module", module)) for module in modules]
    routes = {place: Routes.of(names, place) for place in dict.fromkeys(places)}
    for module, place in zip(modules, places, strict=True):
        module._routes = routes[place]
    try:
        yield
    finally:
        for module, routed in zip(modules, before, strict=True):
            if isinstance(module, Adapted):  # and not removed meanwhile
                module._routes = routed


def frozen_norm_class(module: nn.Module) -> bool:
    """Whether a module is a batch norm whose running statistics training would overwrite."""
    tracks = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    return tracks and not isinstance(module, FrozenStatistics)
