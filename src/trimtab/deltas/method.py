"""The contract of what a user writes: a method is a frozen dataclass that validates itself.

Imports no torch: the command line makes its flags from these classes before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.errors import problems_to_error
from trimtab.options import to_mapping

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trimtab.deltas.delta import Delta
    from trimtab.deltas.layout import Layout


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
    """The learning rate when the user gives none; its source is in `train.settings`."""
    peft_type: ClassVar[str | None] = None
    """PEFT's name for it, when its adapters are saved as PEFT's own; None for a type of trimtab's."""
    stored_names: ClassVar[str] = ""
    """Regular expression of its tensors' names below the module's path; by default `<name>.` and anything."""

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

    def options(self) -> dict[str, Any]:
        """Name and fields as plain values, for YAML and JSON."""
        return {"name": self.name, **to_mapping(self)}


def positive(name: str, value: float) -> list[str]:
    """A problem unless `value` is a finite number above 0."""
    fine = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return [] if fine else [f"{name} is {value}, but must be a finite number above 0"]
