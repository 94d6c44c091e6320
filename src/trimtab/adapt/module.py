"""The adapted form of a module: the module it was, of a class that knows its deltas.

The class is made once for each class of module and cached, as torch's own parametrization does. `isinstance`
holds, parameter names and state-dict keys of the base stay, and taking the deltas off restores the class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from trimtab.deltas.delta import Delta
from trimtab.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Routes:
    """Which rows of a batch go through which adapter.

    groups: (adapter name or None for the base, indices of its rows), covering the batch once. order: where each row of
    the batch is in the groups put one after the other.
    """

    rows: int
    groups: tuple[tuple[str | None, Tensor], ...]
    order: Tensor

    @classmethod
    def of(cls, names: Sequence[str | None], device: torch.device) -> Routes:
        """Row i through names[i], with indices on `device`."""
        indices = {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}
        order = torch.tensor([i for own in indices.values() for i in own]).argsort()
        groups = tuple((name, torch.tensor(own).to(device)) for name, own in indices.items())
        return cls(len(names), groups, order.to(device))


class Copies(nn.Module):
    """An adapter's own trained copies of some parameters (and buffers) of one module.

    A parameter may be kept in more bits than the base has: it is cast to the base's dtype wherever it stands in for it.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def like(self, base: Mapping[str, Tensor | None]) -> dict[str, Any]:
        """The parameters in the dtypes of those they stand in for, `base`: the outputs keep theirs."""
        return {name: p.to(cast("Tensor", base[name]).dtype) for name, p in self._parameters.items() if p is not None}


class _Reclassed:
    """A module whose class was made here: the class `original_class` with a mixin before it."""

    original_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no importable name: rebuild it from the base class and the mixins, then restore the state.
        cls, mixins = cast("Any", type(self)), []
        while issubclass(cls, _Reclassed):
            mixins.append(cls.__bases__[0])
            cls = cls.original_class
        return _empty, (cls, *reversed(mixins)), cast("Any", super()).__getstate__()


class Adapted(_Reclassed):
    """Mixed in before the class of an adapted module. Its attributes are set by `adapt_module`."""

    deltas: nn.ModuleDict
    copies: nn.ModuleDict | None
    """Made only where an adapter trains copies here; most modules have none, and attaching stays quick."""
    _active: tuple[str, ...]
    _routes: Routes | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._routes is not None:
            return self._routed(args, kwargs)
        return self._as(self._active, args, kwargs)

    def _as(self, names: Sequence[str], args: Any, kwargs: Any) -> Any:
        """The module's output with the named adapters."""
        if self.copies is None:
            return self._changed(names, args, kwargs)
        copies = cast("list[Copies]", [self.copies[name] for name in names if name in self.copies])
        module = cast("nn.Module", self)
        parameters, buffers, training = dict(module._parameters), dict(module._buffers), module.training
        for copy in copies:
            module._parameters.update(copy.like(parameters))
            if copy._buffers:  # statistics of the adapter's own, which training may move
                module._buffers.update(copy._buffers)
                module.training = copy.training
        try:
            return self._changed(names, args, kwargs)
        finally:
            for copy in copies:  # a forward may put new tensors in the place of its buffers
                copy._buffers.update({name: module._buffers[name] for name in copy._buffers})
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            module.training = training

    def _changed(self, names: Sequence[str], args: Any, kwargs: Any) -> Any:
        # A model that writes one token at a time feels every lookup here: those of nn.Module, which are slow, are
        # passed by, and deltas are not called through it.
        own: Any = self
        deltas, parameters, y = own._modules["deltas"]._modules, own._parameters, None
        for name in names:
            delta: Delta | None = deltas.get(name)
            if delta is not None:
                x = args[0] if args else next(iter(kwargs.values()))
                weight = parameters.get("weight")
                weight = own.weight if weight is None else weight
                bias = parameters["bias"] if "bias" in parameters else getattr(own, "bias", None)
                y = delta.forward(x, weight, bias) if y is None else y + delta.branch(x, weight, bias)
        return super().forward(*args, **kwargs) if y is None else y  # type: ignore[misc]

    def _routed(self, args: Any, kwargs: Any) -> Any:
        """Each row of the batch through its own adapter: groups of rows, put back in order."""
        routes = cast("Routes", self._routes)
        rows = routes.rows
        batch = next((x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.dim()), None)
        if batch is None or batch.shape[0] != rows:
            got = "no batch" if batch is None else f"a batch of {batch.shape[0]}"
            raise UsageError(
                f"rows() was given {rows} names, but a {self._class_name()} received {got}: "
                "give one name for each row, and adapt no module whose input has no batch dimension"
            )
        pieces = []
        for name, own in routes.groups:
            picked_args, picked_kwargs = tree_map(lambda x, own=own: _rows(x, own, rows), (args, kwargs))
            pieces.append(tree_flatten(self._as((name,) if name else (), picked_args, picked_kwargs)))
        leaves = [self._joined(parts, routes) for parts in zip(*(leaves for leaves, _ in pieces), strict=True)]
        return tree_unflatten(leaves, pieces[0][1])

    def _joined(self, parts: tuple[Any, ...], routes: Routes) -> Any:
        """One output of every group as the output of the batch."""
        if not isinstance(parts[0], Tensor):
            return parts[0]
        if any(part.shape[:1] != index.shape for part, (_, index) in zip(parts, routes.groups, strict=True)):
            raise UsageError(f"rows() cannot route a {self._class_name()}: its output has no batch dimension")
        return torch.cat(parts)[routes.order]

    def _class_name(self) -> str:
        return type(self).original_class.__name__


def _rows(x: Any, own: Tensor, rows: int) -> Any:
    return x[own] if isinstance(x, Tensor) and x.shape[:1] == (rows,) else x


class FrozenStatistics(_Reclassed):
    """Mixed in before a batch norm of the frozen base: its running statistics are part of the base.

    _trains: the mode the model was put in, for the adapters' copies and for when the norm is let go.
    """

    _trains: bool

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # type: ignore[misc]
        self._trains, self.training = mode, False
        return self


def freeze_statistics(module: nn.Module) -> None:
    """Keep a norm's running statistics from moving, whatever mode the model is in."""
    training = module.training
    module.__class__ = subclass(type(module), FrozenStatistics)
    module._trains, module.training = training, False  # type: ignore[assignment]


def release_statistics(module: nn.Module) -> None:
    """Undo `freeze_statistics`."""
    training = mode_of(module)
    del module._trains
    module.__class__ = cast("Any", type(module)).original_class
    module.training = training


def mode_of(module: nn.Module) -> bool:
    """Whether a module is in training mode; for a frozen norm, the mode the model was put in."""
    return module._trains if isinstance(module, FrozenStatistics) else module.training


def set_mode(module: nn.Module, training: bool) -> None:
    """Put a module, and not those within it, in or out of training mode."""
    if isinstance(module, FrozenStatistics):
        module._trains = training
    else:
        module.training = training


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module's own training or evaluation mode comes back afterwards."""
    modes = [(module, mode_of(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            set_mode(module, training)


_CLASSES: dict[tuple[Any, type], type[nn.Module]] = {}


def subclass(base: type[nn.Module], mixin: type) -> type[nn.Module]:
    """The class `base` with `mixin` before it; always the same one."""
    if (base, mixin) not in _CLASSES:
        # transformers looks up what of a module it can record by the name that its class prints.
        members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "original_class": base}
        _CLASSES[base, mixin] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), members)
    return _CLASSES[base, mixin]


def _empty(base: type[nn.Module], *mixins: type) -> nn.Module:
    for mixin in mixins:
        base = subclass(base, mixin)
    return object.__new__(base)


def refuse_clash(path: str, module: nn.Module) -> None:
    """UsageError when a module that is not adapted yet has an attribute that adapting it would overwrite."""
    for name in () if isinstance(module, Adapted) else ("deltas", "copies", "_active", "_routes"):
        if (
            name in module.__dict__
            or name in module._modules
            or name in module._parameters
            or hasattr(type(module), name)
        ):
            raise UsageError(f"{path} ({type(module).__name__}) already has an attribute '{name}', which trimtab needs")


def adapt_module(module: nn.Module, form: type[Adapted] = Adapted) -> None:
    """Give a module the adapted class, of this form, and room for deltas; nothing when it has them."""
    if isinstance(module, form):
        return
    if isinstance(module, Adapted):
        name = module._class_name()
        raise UsageError(f"parameters of the {name} itself are trained by an adapter: remove that one first")
    # Written past nn.Module.__setattr__, which is slow: attaching to hundreds of modules is to take milliseconds.
    object.__setattr__(module, "__class__", subclass(type(module), form))
    vars(module).update(copies=None, _active=(), _routes=None)
    module._modules["deltas"] = _dict_of(module)


def _dict_of(module: nn.Module) -> nn.ModuleDict:
    """An empty dict of modules in the mode that `module` is in."""
    made = nn.ModuleDict()
    if not mode_of(module):
        made.training = False
    return made


def put(
    module: nn.Module,
    name: str,
    delta: nn.Module | None = None,
    copies: Copies | None = None,
    form: type[Adapted] = Adapted,
) -> None:
    """Give a module an adapter's delta or copies, adapting its class first where that is still to be done."""
    adapt_module(module, form)
    adapted = cast("Adapted", module)
    for part in (delta, copies):
        if part is not None and part.training != mode_of(module):
            part.train(mode_of(module))
    if delta is not None:
        adapted.deltas._modules[name] = delta  # `check_name` saw to the name
    if copies is not None:
        adapted.copies = _dict_of(module) if adapted.copies is None else adapted.copies
        adapted.copies[name] = copies


def device_of(module: nn.Module) -> torch.device:
    """Where a module's own parameters are, or those within it where it has none."""
    return next(module.parameters()).device


def carried(module: Adapted) -> set[str]:
    """The names of the adapters that have a delta or copies on a module."""
    return {*module.deltas._modules, *(module.copies or ())}


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
    module.__class__ = cast("Any", type(module)).original_class
