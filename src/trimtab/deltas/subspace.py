"""Training in a random subspace: one vector θ_d changes every adapted weight (Li et al. 2018, arXiv 1804.08838;
Aghajanyan et al. 2020, arXiv 2012.13255)."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trimtab.deltas.delta import Delta
from trimtab.deltas.layout import Layout
from trimtab.deltas.method import Method, OnProgress, Site, one_of, whole
from trimtab.errors import FormatError
from trimtab.options import option
from trimtab.subspace.layers import layer_groups
from trimtab.subspace.offsets import Offsets, groups_of

log = logging.getLogger("trimtab")

CACHE_BYTES = 2**32
"""Up to which size P is kept, at some 9 bytes a weight; beyond it is drawn anew for each product, of which drawing is
nine tenths."""
PERIODS = (251, 241, 239, 233, 229, 227, 223, 211)
"""Of the waves that P is known by: primes, which no draw shares."""


@dataclasses.dataclass(frozen=True)
class RandomSubspace(Method):
    """h = (W + (P θ_d)_W) x + b + (P θ_d)_b: `dim` numbers are trained for all weights together, P is random and fixed.

    D counts the weights of the chosen modules and their biases, tied weights once. By default these are the linear
    layers but for the head; embeddings and head are in it where they are named (through such a head the loss is
    computed from the logits of all targets at once), norms never: `trimtab.subspace.reparameterize.Subspace` takes
    every parameter of a model. mode said spends one of the `dim` numbers on each layer, as a factor λ of its part of
    P θ_d; a layer is a transformer block, or with layers "tensor" each weight and each bias. P is not stored but drawn
    from `projection_seed`: a file holds θ_d and eight numbers by which another draw is refused.

    The learning rate is an estimate: a step of Adam on θ_d moves the weights by about lr √d, so that full fine-tuning's
    2e-5 becomes 2e-5 √(D/d), which is 6e-3 for D = 1e8 and d = 1000.
    """

    name: ClassVar[str] = "subspace"
    title: ClassVar[str] = "Random subspace"
    formula: ClassVar[str] = "h = (W + (P θ_d)_W) x"
    paper: ClassVar[str] = "Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, arXiv 2012.13255"
    default_lr: ClassVar[float] = 6e-3
    shared: ClassVar[bool] = True
    projections: ClassVar[tuple[str, ...]] = ("uni", "fastfood-blocks", "fastfood", "sparse-global", "sparse", "dense")

    dim: int = option(1000, "d, how many numbers are trained in all")
    mode: Literal["did", "said"] = option("did", "did, or said: with a factor for each layer, out of dim")
    projection: str = option("uni", f"what P is: {', '.join(projections)}")
    layers: Literal["block", "tensor"] = option("block", "what has a factor of its own in said")
    projection_seed: int = option(0, "P is drawn from it; with another one an adapter is another map")

    def problems(self) -> list[str]:
        found = whole("dim", self.dim) + one_of("mode", self.mode, ("did", "said"))
        found += one_of("projection", self.projection, self.projections)
        found += one_of("layers", self.layers, ("block", "tensor"))
        if self.projection_seed < 0:
            found.append(f"projection_seed is {self.projection_seed}, but must be at least 0")
        return found

    def delta(self, layout: Layout, weight: Tensor, generator: torch.Generator) -> SubspaceDelta:
        return SubspaceDelta(self, layout)

    def bind(self, sites: Sequence[Site]) -> None:
        space = Space(self, sites)
        for number, delta in enumerate(_deltas(sites)):
            delta.join(space, *space.places[number], holds=number == 0)

    def prepare(self, sites: Sequence[Site], steps: int, progress: OnProgress | None = None) -> None:
        _deltas(sites)[0].space.refuse_other_draw()  # a checkpoint may be another machine's


def _deltas(sites: Sequence[Site]) -> list[SubspaceDelta]:
    return [site.delta for site in sites if isinstance(site.delta, SubspaceDelta)]


class Space(Offsets):
    """What the deltas of one adapter share: θ_d, and P θ_d, computed once for all of them.

    drawn: eight entries of Pᵀ w for fixed waves w, by which a draw that differs is found. order: what the weights
    are, in order. places: for each delta the numbers of its weight and of its bias among the tensors; tied weights are
    one tensor.
    """

    drawn: Tensor
    order: Tensor

    def __init__(self, method: RandomSubspace, sites: Sequence[Site]) -> None:
        sizes: list[int] = []
        names: list[str] = []
        known: dict[Any, int] = {}
        self.places: list[tuple[int, int]] = []
        for site in sites:
            at, path = known.setdefault(_identity(site.weight), len(sizes)), site.path.partition("[")[0]
            if at == len(sizes):
                sizes, names = [*sizes, site.weight.numel()], [*names, path]
            self.places.append((at, len(sizes)))
            if site.delta.layout.bias:
                sizes, names = [*sizes, site.delta.layout.out_features], [*names, path]
        groups = groups_of(method.mode, "tensor" if method.layers == "tensor" else None, layer_groups(names))
        seed = method.projection_seed
        super().__init__(sizes, groups, method.dim, method.projection, seed, cache_bytes=CACHE_BYTES)
        told = [(site.path, tuple(site.weight.shape), *own) for site, own in zip(sites, self.places, strict=True)]
        digest = hashlib.sha256(repr(told).encode()).digest()
        self.register_buffer("order", torch.tensor(int.from_bytes(digest[:7], "big")))
        self.register_buffer("drawn", self.theta_d.new_zeros(len(PERIODS)))
        if not self.theta_d.is_meta:  # else only its size is asked for
            log.info("drawing P for %s weights and biases from seed %d", f"{sum(sizes):,}", seed)
            self.drawn = self._entries()
        self._here = None if self.theta_d.is_meta else (self.order.clone(), self.drawn.clone())
        self._known: _Known | None = None

    def _entries(self) -> Tensor:
        D, wanted = sum(self.sizes), len(PERIODS)
        waves = PERIODS[: -(-wanted // self.theta_d.numel())]  # one, unless it has fewer entries than are wanted
        found = [self.projection.adjoint(torch.linspace(-1, 1, n).repeat(-(-D // n))[:D]) for n in waves]
        entries = torch.cat(found)
        return entries[torch.linspace(0, len(entries) - 1, wanted).long()].clone()

    def refuse_other_draw(self) -> None:
        """FormatError when θ_d, of a file or a checkpoint, was trained with another P or for other weights."""
        if self._here is None:
            return
        order, drawn = self._here
        if not torch.equal(self.order.cpu(), order):
            raise FormatError("its θ_d was trained for other weights, or for these in another order")
        if not torch.allclose(self.drawn.float().cpu(), drawn, rtol=0.05, atol=0.02):  # another dtype rounds
            raise FormatError(
                f"its θ_d belongs to another P than projection_seed {self._drawing[2]} gives in torch "
                f"{torch.__version__}: use the version that it was trained with, and merge it there"
            )

    def part(self, number: int) -> Tensor:
        """The offset of one tensor, flat."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.offsets()[number]
        if self._known is None or not self._known.holds(self.trained()):
            self._known = _Known(self.trained(), self._computed())
        return self._known.parts[number]

    def _computed(self) -> list[Tensor]:
        # Gradient checkpointing counts what a block saves, and the offsets are computed in the first block alone.
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            flat = self.flat(self.theta_d)
            lambdas = None if self.lambdas is None else self.lambdas.view_as(self.lambdas)
            parts = self.cut(flat, None)
            if lambdas is not None and self.groups is not None:
                scales = lambdas.to(flat.dtype).unbind()
                parts = [_Scaled.apply(p, scales[g]) for g, p in zip(self.groups, parts, strict=True)]  # type: ignore[no-untyped-call]
        for tensor in (flat, lambdas):
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(_forgetting(self))  # type: ignore[no-untyped-call]
        return parts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "_projection": None}  # both are made again


class _Scaled(torch.autograd.Function):
    """λ part. Autograd's own product gives up what it needs with the first backward pass, and the offsets are of
    several where a model is called again before that."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, scale: Tensor) -> Tensor:
        ctx.part, ctx.scale = part, scale
        return scale * part

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0] * ctx.scale, grads[0] @ ctx.part


def _identity(weight: Tensor) -> tuple[Any, ...]:
    """What tied weights have in common, on the meta device too."""
    return weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape, weight.stride()


def _forgetting(space: Space) -> Callable[[Tensor], None]:
    """A hook that drops the offsets: a backward pass through them frees what another one would need."""
    held = weakref.ref(space)

    def forget(gradient: Tensor) -> None:
        own = held()
        if own is not None:
            own._known = None

    return forget


class _Known:
    """Offsets that are computed already, of what, and in which mode."""

    def __init__(self, trained: list[nn.Parameter], parts: list[Tensor]) -> None:
        self.trained, self.parts, self.mode = trained, parts, _mode(trained)
        self.values = [parameter.detach().clone() for parameter in trained]

    def holds(self, trained: list[nn.Parameter]) -> bool:
        """Whether they are those of these parameters, as they are now."""
        same = all(own is other for own, other in zip(self.trained, trained, strict=True))
        # The values are compared too: whoever writes through .data leaves no other trace.
        return same and self.mode == _mode(trained) and all(map(torch.equal, self.values, trained))


def _mode(trained: list[nn.Parameter]) -> tuple[Any, ...]:
    """What offsets depend on besides values."""
    own = [(p.device, p.dtype, p.requires_grad) for p in trained]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), own


class SubspaceDelta(Delta):
    """The part of P θ_d that is a weight's, and its bias's. The first delta of an adapter has the space as its child.

    at, bias_at: the numbers of weight and bias among the tensors of the space.
    """

    space: Space
    at: int
    bias_at: int

    def join(self, space: Space, at: int, bias_at: int, holds: bool) -> None:
        """Take a part of a space. holds: whether the space is in this delta's state dict."""
        vars(self).update(at=at, bias_at=bias_at)
        if holds:
            self.space = space
        else:
            vars(self)["space"] = space

    def weight_change(self, weight: Tensor) -> Tensor:
        return self.layout.matrix(self.space.part(self.at).to(weight.device).view(weight.shape))

    def bias_change(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or not self.layout.bias:
            return None
        return self.space.part(self.bias_at).to(bias.device)

    def branch(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        change = self.layout.shaped(self.weight_change(weight), weight).to(weight.dtype)
        own = self.bias_change(bias)
        return self.layout.base(x, change, None if own is None else own.to(weight.dtype))

    def restored(self) -> None:
        if "space" in self._modules:
            self.space.refuse_other_draw()
