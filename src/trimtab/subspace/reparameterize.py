"""Any module with its parameters in a random subspace: θ = θ0 + P θ_d, with θ0 the module's own parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.errors import UsageError, did_you_mean
from trimtab.models.last_layer import recomputes
from trimtab.patterns import matches
from trimtab.subspace.layers import layer_groups
from trimtab.subspace.offsets import Offsets, groups_of


class Subspace(Offsets):
    """A model whose parameters are a function of θ_d [d] (and, for SAID, of λ): calling it calls the model with them.

    The model is a child, so buffers, modes, devices and state dict are its own; its parameters are θ0, are never
    written and get no gradient. Give an optimizer `trained()`, since `parameters()` is of the model as well. Tied
    weights are one slice of θ and stay tied.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *args: Any, **options: Any) -> None:
        start = dict(model.named_parameters())
        super().__init__([start[name].numel() for name in names], *args, **options)
        self.model, self.names = model, tuple(names)
        self._kept: dict[str, Tensor] | None = None
        self.training = model.training
        for parameter in self.trained():
            parameter.data = parameter.data.to(start[names[0]].device)
        _ = self.projection  # drawn here, since torch.func.vmap lets nothing be drawn

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        d: int,
        mode: str = "did",
        projection: str = "uni",
        seed: int = 0,
        leave_out: Sequence[str] = (),
        layers: str | None = None,
        **options: Any,
    ) -> Subspace:
        """The model in a subspace of d dimensions; with θ_d = 0 it computes what it did.

        θ: every parameter that requires a gradient, biases, norms, embeddings and head included, but for those that
        match `leave_out`, patterns of parameters or of modules, which stay as they are. mode: did or said. layers: what
        has a λ of its own in SAID, None for a block, the embeddings, the head (`layer_groups`), "tensor" for each
        tensor. projection, seed, options: see `make_projection`.
        Raises UsageError for d < 1, d > D, d not above the number of layers (SAID), a pattern that matches nothing, a
        model without trainable parameters.
        """
        trainable = [name for name, p in model.named_parameters() if p.requires_grad and p.numel()]
        if not trainable:
            raise UsageError(f"this {type(model).__name__} has no trainable parameters: let some require a gradient")
        names = _without(trainable, leave_out)
        groups = groups_of(mode, layers, layer_groups(names))
        return cls(model, names, groups, d, projection, seed, **options)

    @property
    def D(self) -> int:
        """How many entries θ has."""
        return sum(self.sizes)

    def weights(self, theta_d: Tensor | None = None, lambdas: Tensor | None = None) -> dict[str, Tensor]:
        """Every parameter of the model by name: θ0 + offset, added in fp32 and rounded once to the parameter's dtype.

        A function of theta_d and lambdas where they are given, for torch.func; else of the module's own.
        """
        found = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        for name, offset in zip(self.names, self.offsets(theta_d, lambdas), strict=True):
            start = found[name]
            # An offset is about ‖θ_d‖/√D and would be lost in bf16, so both are wide when they are added.
            own = offset.to(start.device, torch.promote_types(start.dtype, offset.dtype)).view(start.shape)
            own.data.add_(start)  # in place, or there were another vector as long as θ; a constant has no gradient
            found[name] = own.to(start.dtype)
        return found

    def call(self, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """What the model computes with these parameters, tied ones being tied. weights: those of `weights`."""
        if recomputes(self.model):
            raise UsageError(
                "gradient checkpointing computes again after the weights are gone: turn it off with "
                "model.gradient_checkpointing_disable()"
            )
        return functional_call(self.model, dict(weights), args, kwargs, tie_weights=True)

    @contextmanager
    def weights_kept(self) -> Iterator[None]:
        """Within the block all calls compute with the weights of its beginning: P θ_d is made once for several."""
        self._kept = self.weights()
        try:
            yield
        finally:
            self._kept = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self._kept or self.weights(), *args, **kwargs)


def _without(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that no pattern leaves out. UsageError for one that matches none, and when none is left."""
    for pattern in patterns:
        if not any(_is_named(pattern, name) for name in names):
            known = {part for name in names for part in name.split(".")}
            raise UsageError(f"leave_out '{pattern}' matches no trainable parameter{did_you_mean(pattern, known)}")
    kept = [name for name in names if not any(_is_named(pattern, name) for pattern in patterns)]
    if not kept:
        raise UsageError(f"leave_out takes all {len(names)} trainable parameters: leave some to train")
    return kept


def _is_named(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter, or a module that it is in."""
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[:end])) for end in range(1, len(parts) + 1))
