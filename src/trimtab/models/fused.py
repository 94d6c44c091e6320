"""Parts of a model that are computed in fewer steps and with less memory, chosen by what they compute.

A part is taken only when it gives, on random inputs, what the leaner form gives. A module keeps its class, parameters
and hooks and gets a forward of ours for the time of a block; a function of transformers' is replaced in the file of the
model that calls it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.adapt.module import Adapted, modes_kept, subclass
from trimtab.deltas.layout import original_class
from trimtab.errors import TRIAL_FAILURES, ran_out_of_memory
from trimtab.ops.gated import Activation, gated
from trimtab.ops.precision import autocasts
from trimtab.ops.products import linear, quicker_than_torch
from trimtab.ops.rms_norm import rms_norm
from trimtab.ops.rotary import rotate

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
GATED = (*PROJECTIONS, "act_fn")
"""The children of a gated feed-forward layer, as transformers' models name them."""
EPSILONS = ("variance_epsilon", "eps")
"""What transformers' models call the ε of a norm."""
PLAIN = (bool, int, float, str)
"""Types of attributes that are alike where they are equal."""
ROTARY = "apply_rotary_pos_emb"
"""The function by which transformers' models rotate queries and keys."""


class GatedLayer:
    """Mixed in before a module that computes down(act(gate(x)) ⊙ up(x))."""

    def forward(self, x: Tensor) -> Tensor:
        own = cast("Any", self)
        h: Tensor = own.down_proj(gated(own.gate_proj(x), own.up_proj(x), self.activation()))
        return h

    def activation(self) -> Activation:
        """act."""
        act: Activation = cast("Any", self).act_fn
        return act


class SwiGLULayer(GatedLayer):
    """The same with SiLU, whatever class the model has it in."""

    def activation(self) -> Activation:
        return F.silu


class RMSNormLayer:
    """Mixed in before a module that computes (w₀ + w) ⊙ x / √(mean(x²) + ε)."""

    offset: ClassVar[float] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        weight = cast("Tensor", cast("Any", self).weight)
        if weight.requires_grad:  # trained along with the adapter
            y: Tensor = super().forward(x)  # type: ignore[misc]
            return y
        return rms_norm(x, weight, _epsilon(cast("nn.Module", self)), self.offset)


class RMSNormLayerFromOne(RMSNormLayer):
    """The same with w₀ = 1, as Gemma has it."""

    offset = 1.0


class QuickLinear:
    """Mixed in before a linear layer whose products the machine has a faster way for than torch takes."""

    def forward(self, x: Tensor) -> Tensor:
        own = cast("nn.Linear", self)
        if x.dtype != own.weight.dtype or autocasts(x.device):
            y: Tensor = super().forward(x)  # type: ignore[misc]
            return y
        return linear(x, own.weight, own.bias)


class Rotary:
    """Queries and keys rotated as `own` does, a function of transformers' with this signature that turns whole heads by
    halves. What it does with an angle for a part of a head, or with angles of more bits, is left to itself."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1]
        if not (whole and cos.dtype == sin.dtype == q.dtype == k.dtype):
            turned: tuple[Tensor, Tensor] = self.own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return turned
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotate(q, cos, sin), rotate(k, cos, sin)


@contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Within the block parts of the model take fewer steps. Gives the number of modules taken."""
    verdicts: dict[Any, type | None] = {}
    changed: list[nn.Module] = []
    replaced: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            mixin = _form_of(module, verdicts)
            if mixin is not None:
                module.__class__ = subclass(type(module), mixin)
                changed.append(module)
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        for name in {original_class(module).__module__ for module in model.modules()}:
            own = getattr(sys.modules.get(name), ROTARY, None)
            if own is not None and not isinstance(own, Rotary) and _rotates_by_halves(own, dtype):
                setattr(sys.modules[name], ROTARY, Rotary(own))
                replaced.append((sys.modules[name], own))
        yield len(changed)
    finally:
        for file, own in replaced:
            setattr(file, ROTARY, own)
        for module in changed:
            module.__class__ = cast("Any", type(module)).original_class


def _form_of(module: nn.Module, verdicts: dict[Any, type | None]) -> type | None:
    """The mixin that computes what the module computes; None if there is none. Tried once for all of one `_kind`."""
    if isinstance(module, GatedLayer | RMSNormLayer | QuickLinear):
        return None
    if type(module) is nn.Linear and quicker_than_torch(module.weight):
        return QuickLinear
    forms: tuple[type, ...]
    if _looks_gated(module):
        forms, weight = (SwiGLULayer, GatedLayer), cast("Any", module.gate_proj).weight
    elif _looks_like_a_norm(module):
        forms, weight = (RMSNormLayer, RMSNormLayerFromOne), module.weight
    else:
        return None
    kind = _kind(module)
    if kind not in verdicts:
        verdicts[kind] = next((form for form in forms if _computes(module, form, cast("Tensor", weight))), None)
    return verdicts[kind]


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What tells modules apart that compute differently: class, attributes, and children but for the projections."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    told = ((name, value if isinstance(value, PLAIN) else id(value)) for name, value in own.items())
    children = ((name, *_kind(child)) for name, child in module.named_children() if name not in PROJECTIONS)
    return original_class(module), *told, *children


def _looks_gated(module: nn.Module) -> bool:
    if not all(hasattr(module, name) for name in GATED) or not _takes_one(module):
        return False
    projections = [isinstance(getattr(module, name), nn.Linear) for name in PROJECTIONS]
    return all(projections) and not any(True for _ in cast("nn.Module", module.act_fn).parameters())


def _looks_like_a_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    alone = isinstance(weight, nn.Parameter) and weight.dim() == 1 and len(module._parameters) == 1
    bare = not module._modules and not module._buffers and not isinstance(module, Adapted)
    return alone and bare and any(isinstance(getattr(module, e, None), float) for e in EPSILONS) and _takes_one(module)


def _takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2


def _epsilon(module: nn.Module) -> float:
    return cast("float", next(getattr(module, name) for name in EPSILONS if hasattr(module, name)))


@torch.no_grad()
def _computes(module: nn.Module, form: type, like: Tensor) -> bool:
    """Whether the form gives what the module does, in training too: what drops out is something else.

    like: the weight that reads its input, [..., width].
    """
    draw = torch.Generator().manual_seed(0)
    # Of three sizes, so that an ε shows.
    x = (torch.randn(3, like.shape[-1], generator=draw) * torch.tensor([[1.0], [1e-1], [1e-3]])).to(like)
    kind, trained = type(module), like.requires_grad
    with modes_kept(module), torch.random.fork_rng():
        like.requires_grad_(False)
        try:
            own = _in_both_modes(module, x)
            module.__class__ = subclass(kind, form)
            return _same(own, _in_both_modes(module, x))
        except TRIAL_FAILURES as error:
            return _is_no_answer(error)
        finally:
            module.__class__ = kind
            like.requires_grad_(trained)


def _in_both_modes(module: nn.Module, x: Tensor) -> Tensor:
    """[2, ...]: what the module gives in evaluation and in training, its projections without an adapter's dropout."""
    found = []
    for training in (False, True):
        module.train(training)
        for name in PROJECTIONS:
            getattr(module, name, nn.Identity()).eval()
        found.append(module(x))
    return torch.stack(found)


@torch.no_grad()
def _rotates_by_halves(own: Any, dtype: torch.dtype) -> bool:
    ours = Rotary(own)
    if list(inspect.signature(own).parameters) != list(inspect.signature(ours).parameters):
        return False
    draw = torch.Generator().manual_seed(0)
    shapes = (1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8)
    q, k, cos, sin = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    try:
        return all(_same(a, b) for a, b in zip(own(q, k, cos, sin), ours(q, k, cos, sin), strict=True))
    except TRIAL_FAILURES as error:
        return _is_no_answer(error)


def _is_no_answer(error: Exception) -> bool:
    """False: what takes no such inputs computes something else. Out of memory says nothing, and is raised."""
    if ran_out_of_memory(error):
        raise error
    return False


def _same(own: Any, ours: Tensor) -> bool:
    """Whether two results differ by the order of rounding at most."""
    if not isinstance(own, Tensor) or own.dtype != ours.dtype or own.shape != ours.shape:
        return False
    few = 4 * torch.finfo(ours.dtype).eps
    if not bool(own.isfinite().all()):
        return False
    return torch.allclose(own, ours, rtol=few, atol=few * float(own.abs().max()))
