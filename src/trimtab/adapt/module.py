"""The adapted form of a module: the module it was, of a class that knows its deltas.

The class is made once for each class of module and cached, as torch's own parametrization does. `isinstance`
holds, parameter names and state-dict keys of the base stay, and taking the deltas off restores the class.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.deltas.delta import Delta
from trimtab.deltas.layout import original_class
from trimtab.errors import UsageError

Routes = tuple[tuple[str | None, Tensor], ...]
"""(adapter name or None for the base, indices of its rows in the batch), covering the batch once."""


class Copies(nn.Module):
    """An adapter's own trained copies of some parameters (and buffers) of one module."""

    def __init__(self, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


class Adapted:
    """Mixed in before the class of an adapted module. Its attributes are set by `adapt_module`."""

    original_class: type[nn.Module]
    deltas: nn.ModuleDict
    copies: nn.ModuleDict | None
    """Made only where an adapter trains copies here; most modules have none, and attaching stays quick."""
    _active: tuple[str, ...]
    _routes: tuple[int, Routes] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._routes is not None:
            return self._routed(args, kwargs)
        return self._as(self._active, args, kwargs)

    def _as(self, names: Sequence[str], args: Any, kwargs: Any) -> Any:
        """The module's output with the named adapters."""
        deltas = cast("list[Delta]", [self.deltas[n] for n in names if n in self.deltas])
        copies = cast("list[Copies]", [self.copies[n] for n in names if n in self.copies] if self.copies else [])
        if len(copies) > 1:
            raise UsageError("two enabled adapters both replace the same parameters: switch to one of them")
        if not copies:
            return self._changed(deltas, args, kwargs)
        module = cast("nn.Module", self)
        parameters, buffers = dict(module._parameters), dict(module._buffers)
        module._parameters.update(copies[0]._parameters)
        module._buffers.update(copies[0]._buffers)
        try:
            return self._changed(deltas, args, kwargs)
        finally:
            module._parameters.update(parameters)
            module._buffers.update(buffers)

    def _changed(self, deltas: list[Delta], args: Any, kwargs: Any) -> Any:
        if not deltas:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x: Tensor = args[0] if args else kwargs["input"]
        weight, bias = cast("Tensor", self.weight), cast("Tensor | None", getattr(self, "bias", None))  # type: ignore[attr-defined]
        y = deltas[0](x, weight, bias)
        for delta in deltas[1:]:
            y = y + delta.branch(x, weight)
        return y

    def _routed(self, args: Any, kwargs: Any) -> Any:
        """Each row of the batch through its own adapter: groups of rows, put back in order."""
        rows, routes = cast("tuple[int, Routes]", self._routes)
        x = args[0]
        if x.shape[0] != rows:
            raise UsageError(
                f"rows() was given {rows} names, but a {type(self).original_class.__name__} received a batch of {x.shape[0]}: "
                "give one name for each row, and adapt no module whose input has no batch dimension"
            )
        pieces = []
        for name, index in routes:
            own = index.to(x.device)
            picked = tuple(a[own] if isinstance(a, Tensor) and a.shape[:1] == x.shape[:1] else a for a in args)
            pieces.append(self._as((name,) if name else (), picked, kwargs))
        order = torch.cat([index for _, index in routes]).argsort().to(x.device)
        return torch.cat(pieces)[order]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no importable name: rebuild it from the base class, then restore the state.
        return _empty, (type(self).original_class,), cast("Any", super()).__getstate__()


class FrozenStatistics:
    """Mixed in before a batch norm of the frozen base: its running statistics are part of the base."""

    original_class: type[nn.Module]

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self).original_class, FrozenStatistics), cast("Any", super()).__getstate__()


@functools.cache
def subclass(base: type[nn.Module], mixin: type) -> type[nn.Module]:
    """The class `base` with `mixin` before it."""
    return type(
        f"{mixin.__name__}{base.__name__}", (mixin, base), {"__module__": base.__module__, "original_class": base}
    )


def _empty(base: type[nn.Module], mixin: type = Adapted) -> nn.Module:
    return cast("nn.Module", object.__new__(subclass(base, mixin)))


def adapt_module(module: nn.Module) -> None:
    """Give a module the adapted class and room for deltas; nothing when it has them."""
    if isinstance(module, Adapted):
        return
    for name in ("deltas", "copies"):
        if hasattr(module, name):
            raise UsageError(f"a {type(module).__name__} already has an attribute '{name}', which trimtab needs")
    module.__class__ = subclass(type(module), Adapted)
    module.deltas = nn.ModuleDict()
    module.copies = None
    module._active = ()  # type: ignore[assignment]
    module._routes = None  # type: ignore[assignment]


def put(module: nn.Module, name: str, delta: Delta | None = None, copies: Copies | None = None) -> None:
    """Give a module an adapter's delta or copies, adapting its class first where that is still to be done."""
    adapt_module(module)
    adapted = cast("Adapted", module)
    if delta is not None:
        adapted.deltas[name] = delta
    if copies is not None:
        adapted.copies = nn.ModuleDict() if adapted.copies is None else adapted.copies
        adapted.copies[name] = copies


def carried(module: Adapted) -> set[str]:
    """The names of the adapters that have a delta or copies on a module."""
    return {*module.deltas, *(module.copies or ())}


def drop(module: nn.Module, name: str) -> None:
    """Take an adapter's delta and copies off a module; with the last ones gone it gets its own class back."""
    adapted = cast("Adapted", module)
    if name in adapted.deltas:
        del adapted.deltas[name]
    if adapted.copies is not None and name in adapted.copies:
        del adapted.copies[name]
    if not carried(adapted):
        restore_module(module)


def restore_module(module: nn.Module) -> None:
    """Undo `adapt_module`: the class and the attributes the module had."""
    del module.deltas, module.copies, module._active, module._routes
    module.__class__ = original_class(module)
