"""The contract of what a user writes: a method is a frozen dataclass that validates itself.

Imports no torch: the command line makes its flags from these classes before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from trimtab.errors import problems_to_error
from trimtab.options import to_mapping

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trimtab.deltas.delta import Delta
    from trimtab.deltas.layout import Layout


OnProgress = Callable[[int, int, str], None]
"""progress(done, total, text)."""


class Site(NamedTuple):
    """A weight that a method changes. weight: in the shape that the delta's layout has it; not to be written."""

    path: str
    delta: Delta
    weight: Tensor


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of every method. Subclasses are frozen dataclasses whose fields are made with `options.option`."""

    name: ClassVar[str]
    """How the registry, the command line and saved files call it."""
    title: ClassVar[str]
    """How people write it, for reports."""
    formula: ClassVar[str]
    """The adapted map in one line, in the paper's symbols."""
    paper: ClassVar[str]
    """Where it comes from."""
    default_lr: ClassVar[float] = 2e-4
    """The learning rate when the user gives none; its source is in the method's docstring, or in `train.settings`."""
    default_targets: ClassVar[tuple[str, ...]] = ("all-linear",)
    """The modules it goes to when the user names none; patterns that match nothing in a model are passed over."""
    peft_type: ClassVar[str | None] = None
    """PEFT's name for it, when its adapters are saved as PEFT's own; None for a type of trimtab's."""
    peft_lacks: ClassVar[tuple[str, ...]] = ()
    """Keys of a LoRA's adapter_config.json that PEFT's configuration of this method does not have."""
    peft_marks: ClassVar[Mapping[str, Any]] = {}
    """Keys of PEFT's configuration, and their values, that tell this method from others of the same type."""
    mergeable: ClassVar[bool] = True
    """Whether its map is a change of the weight and the bias, which can be put in their place."""
    stored_names: ClassVar[str] = ""
    """Regular expression of its tensors' names below the module's path; by default `<name>.` and anything."""

    shared: ClassVar[bool] = False
    """Whether its deltas share what they train: the first of an adapter holds it, and is alone in an adapter file.
    Tied weights then have the same change."""

    def __post_init__(self) -> None:
        problems_to_error(self.problems(), f"{type(self).__name__}")

    def problems(self) -> list[str]:
        """What is wrong with the values, one sentence each; empty when they are fine."""
        return []

    def at(self, path: str) -> Method:
        """The method as it applies to the module at `path`, patterns resolved."""
        return self

    def patterns(self) -> tuple[str, ...]:
        """Module patterns that fields of this method use; each must match a chosen module."""
        return ()

    def unfit(self, layout: Layout) -> str | None:
        """Why this method should not be put on a weight, or None. Asked when attaching, not when loading."""
        return None

    def peft_config(self) -> dict[str, Any]:
        """The method's own keys of adapter_config.json, rank and alpha excepted (the deltas say those)."""
        return {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Method:
        """The method an adapter_config.json describes. UsageError names a feature trimtab does not have."""
        raise NotImplementedError

    def delta(self, layout: Layout, weight: Tensor, generator: torch.Generator) -> Delta:
        """A fresh delta for one weight, in fp32 on the CPU. `generator` makes every random draw."""
        raise NotImplementedError

    def bind(self, sites: Sequence[Site]) -> None:
        """Called once every delta of an adapter is made, before anything else is done with them, when attaching and
        loading alike: for what they share. The weights may be on the meta device, where only sizes are asked for.
        """

    def begin(self, sites: Sequence[Site], progress: OnProgress | None = None) -> None:
        """Called when attaching, not when loading, once every delta is made: for a start that is worked out of the
        weights, which a file holds instead. UsageError names the weight that it cannot begin from.

        progress(done, total, text) is told how far it is.
        """

    def foreign(self, sites: Sequence[Site]) -> str | None:
        """Of a loaded adapter: which of its weights is not the one that it was made of, and why; None if all are."""
        return None

    def lr_factor(self, parameter: str) -> float:
        """What the learning rate of a delta's parameter is multiplied by. parameter: its name in the delta."""
        return 1.0

    def prepare(self, sites: Sequence[Site], steps: int, progress: OnProgress | None = None) -> None:
        """Called before a run of `steps` optimizer steps, or what is left of it: for what takes long, and to refuse
        what cannot work.

        progress(done, total, text) is told how far it is.
        """

    def settled(self, step: int, sites: Sequence[Site]) -> bool:
        """Whether the weights after this optimizer step can be a run's result: not while the method is being set up."""
        return True

    def penalty(self, sites: Sequence[Site]) -> Tensor | None:
        """What the method adds to the loss of an optimizer step, as a scalar with a gradient; None for nothing."""
        return None

    def after_step(self, step: int, sites: Sequence[Site]) -> list[nn.Parameter]:
        """Called once after optimizer step `step` (1 for the first), its gradients still there; never inside forward.

        Here for what concerns several weights at once; the deltas' own `after_step` by default. Returns parameters
        that mean something else from now on: what the optimizer has gathered about them is forgotten.
        """
        for site in sites:
            site.delta.after_step(step, site.weight)
        return []

    def options(self) -> dict[str, Any]:
        """Name and fields as plain values, for YAML and JSON."""
        return {"name": self.name, **to_mapping(self)}


def positive(name: str, value: float) -> list[str]:
    """A problem unless `value` is a finite number above 0."""
    fine = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return [] if fine else [f"{name} is {value}, but must be a finite number above 0"]


def whole(name: str, value: int) -> list[str]:
    """A problem unless `value` is a whole number of at least 1."""
    fine = isinstance(value, int) and value >= 1
    return [] if fine else [f"{name} is {value}, but must be a whole number of at least 1"]


def probability(name: str, value: float) -> list[str]:
    """A problem unless `value` is at least 0 and below 1."""
    return [] if 0.0 <= value < 1.0 else [f"{name} is {value}, but must be at least 0 and below 1"]


def one_of(name: str, value: str, known: Sequence[str]) -> list[str]:
    """A problem unless `value` is one of the known words."""
    return [] if value in known else [f"{name} is '{value}', but must be one of {', '.join(known)}"]
