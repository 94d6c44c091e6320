"""How a search for an intrinsic dimension goes, as it is asked for."""

from __future__ import annotations

import dataclasses
import math

from trimtab.errors import UsageError
from trimtab.subspace.crossing import Threshold

SWEEP_SEED = 10_000
"""The seed with which learning rates are compared: none that is measured with."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a search goes.

    seeds: how many, at least 2 for an interval. resolution: the search ends with a bracket whose ends are at most this
    ratio apart; those of an interval of three seeds are 1.2 to 1.9 apart on MNIST. start: the first d; by default √D.
    factor: by which d is raised, or lowered, until the threshold lies between two of them: 4 crosses the six decades of
    a large model in ten steps. grid: exactly these d instead of a search.
    lr: of training all parameters. lr_scale: sqrt multiplies it by √(D/d) in a subspace, since with unit columns a
    step of Adam moves θ by lr √d and not by lr √D; none leaves it as the papers do. rates: multiples of it to choose
    from, with a seed of its own. rates_at: each d has a choice of its own, or what is best at
    the first d that is tried is taken at all of them; where nothing is learned there at any rate, each d has its own
    until there is something to choose by. For the baseline there is a choice in both cases.
    """

    seeds: int = 3
    threshold: Threshold = dataclasses.field(default_factory=Threshold)
    resolution: float = 1.2
    start: int | None = None
    factor: float = 4.0
    grid: tuple[int, ...] = ()
    lr: float = 1e-3
    lr_scale: str = "sqrt"
    rates: tuple[float, ...] = (1.0,)
    rates_at: str = "each"

    def __post_init__(self) -> None:
        problems = []
        if self.seeds < 1:
            problems.append(f"seeds is {self.seeds}, but must be at least 1")
        if self.seeds > SWEEP_SEED:
            problems.append(
                f"seeds is {self.seeds}, but must be at most {SWEEP_SEED}, which chooses the learning rates"
            )
        if not self.resolution >= 1:
            problems.append(f"resolution is {self.resolution}, but must be at least 1")
        if not 1 < self.factor < math.inf:
            problems.append(f"factor is {self.factor}, but must be a number above 1")
        if not 0 < self.lr < math.inf:
            problems.append(f"lr is {self.lr:g}, but must be a number above 0")
        whole = {"seeds": (self.seeds,), "start": (self.start,) if self.start is not None else (), "grid": self.grid}
        problems += [
            f"{name} is {value}, but must be a whole number"
            for name, values in whole.items()
            for value in values
            if value % 1
        ]
        if self.lr_scale not in ("sqrt", "none"):
            problems.append(f"lr_scale is '{self.lr_scale}', but must be sqrt or none")
        if self.rates_at not in ("each", "first"):
            problems.append(f"rates_at is '{self.rates_at}', but must be each or first")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            problems.append(f"rates are {list(self.rates)}, but must be numbers above 0")
        if problems:
            raise UsageError("; ".join(problems))
