"""LoRA-Dash: low-rank adaptation that finds task-specific directions and strengthens them (Si et al. 2024,
arXiv 2409.01035)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab.deltas.core_bases import CoreBases, change_rates, core_bases, prepare
from trimtab.deltas.delta import wide
from trimtab.deltas.layout import Layout
from trimtab.deltas.lora import LoRA
from trimtab.deltas.low_rank import LowRankDelta
from trimtab.deltas.method import OnProgress, Site, one_of, positive, whole
from trimtab.errors import UsageError
from trimtab.options import option

log = logging.getLogger("trimtab")


@dataclasses.dataclass(frozen=True)
class Dash(LoRA):
    """h = W x + (α/r) B A x + U_S (d ⊙ V_Sᵀ x), with S the core directions of W that change most.

    For `warm_up_steps` optimizer steps it is LoRA. Then each weight's singular vectors are ranked by their change rate
    δᵢ = |uᵢᵀ ΔW vᵢ| / (σᵢ + ε), ΔW = (α/r) B A, and the first `directions` of them get a coordinate each, zero at the
    start, so that the output goes on where it was. A, B and d are trained from there. Exported, it is a LoRA of rank
    r + s: the same map to 1e-6 on a base in fp32, and to the base's rounding on one of fewer bits.
    """

    name: ClassVar[str] = "dash"
    title: ClassVar[str] = "LoRA-Dash"
    formula: ClassVar[str] = "h = W x + (α/r) B A x + U_S (d ⊙ V_Sᵀ x)"
    paper: ClassVar[str] = "Si et al. 2024, arXiv 2409.01035"
    peft_type: ClassVar[str | None] = None
    stored_names: ClassVar[str] = ""

    directions: int = option(8, "s, the task-specific directions of each weight")
    warm_up_steps: int = option(100, "optimizer steps of plain LoRA before the directions are chosen")
    pick: Literal["change-rate", "random", "smallest", "largest"] = option(
        "change-rate", "the directions: those that change most; for study at random, of the smallest or largest σ"
    )
    budget: Literal["layer", "model"] = option(
        "layer", "as many directions for each weight, or as many on average where they change most"
    )
    direction_lr: float = option(1.0, "what the learning rate of the coordinates d is multiplied by")
    freeze_factors: bool = option(False, "train the coordinates alone once the directions are chosen")

    def problems(self) -> list[str]:
        found = super().problems() + positive("direction_lr", self.direction_lr)
        found += whole("directions", self.directions) + whole("warm_up_steps", self.warm_up_steps)
        found += one_of("pick", self.pick, ("change-rate", "random", "smallest", "largest"))
        found += one_of("budget", self.budget, ("layer", "model"))
        if self.budget == "model" and self.pick != "change-rate":
            found.append(f"budget 'model' compares change rates, so pick cannot be '{self.pick}'")
        return found

    def unfit(self, layout: Layout) -> str | None:
        smaller = min(layout.out_features, layout.in_features)
        if self.directions > smaller:
            return f"{self.directions} directions are above the {smaller} core directions of the weight"
        return super().unfit(layout)

    def lr_factor(self, parameter: str) -> float:
        return self.direction_lr if parameter == "d" else 1.0

    def delta(self, layout: Layout, weight: Tensor, generator: torch.Generator) -> DashDelta:
        A, B = self.start(layout, generator)
        seed = int(torch.randint(2**62, (), generator=generator)) if self.pick == "random" else 0
        return DashDelta(self, layout, A, B, seed)

    def foreign(self, sites: Sequence[Site]) -> str | None:
        worst = max(sites, key=_misfit)
        if _misfit(worst) <= FITTING:
            return None
        return f"the directions kept for {worst.path} are no singular vectors of its weight"

    def prepare(self, sites: Sequence[Site], steps: int, progress: OnProgress | None = None) -> None:
        if _launched(sites):  # a run that goes on, or one that starts from an adapter that was trained
            self._freeze(sites)
        elif self.warm_up_steps >= steps:
            raise UsageError(
                f"warm_up_steps is {self.warm_up_steps}, but the run has {steps}: no direction would ever be trained. "
                "Lower warm_up_steps, or train longer"
            )
        else:
            prepare([_matrix(site) for site in sites], progress)

    def settled(self, step: int, sites: Sequence[Site]) -> bool:
        return _launched(sites)

    def after_step(self, step: int, sites: Sequence[Site]) -> list[nn.Parameter]:
        if step != self.warm_up_steps or _launched(sites):
            return []
        if self.pick == "change-rate":
            _warn_of_unchanged(step, sites)
        if self.budget == "model":
            _launch_by_model(self.directions * len(sites), sites)
        else:
            for site in sites:
                bases = core_bases(_matrix(site))
                _dash(site).launch(bases, _picked(self, site, bases)[: self.directions])
        self._freeze(sites)
        log.info("LoRA-Dash: directions chosen after step %d", step)
        return [_dash(site).d for site in sites]

    def _freeze(self, sites: Sequence[Site]) -> None:
        if self.freeze_factors and _launched(sites):
            for site in sites:
                _dash(site).A.requires_grad_(False)
                _dash(site).B.requires_grad_(False)


FITTING = 0.1
"""How far W v may be from σ u, as a part of what W makes of any v: rounding to bf16 takes 0.004, another W takes 1."""
WIDEST = 4
"""With one budget for the model, a weight gets at most this many times the average."""


class DashDelta(LowRankDelta):
    """LoRA's A and B; coordinates d [s], and their directions U_S [out, s] and V_S [in, s], zero until chosen.

    picked: [s] int64, the indices of the directions in the order of σ descending; -1 where there is none. seed: of the
    draw, where the directions are drawn.
    """

    method: Dash
    undropped = True
    A: nn.Parameter
    B: nn.Parameter
    d: nn.Parameter
    U: Tensor
    V: Tensor
    picked: Tensor
    seed: Tensor

    def __init__(self, method: Dash, layout: Layout, A: Tensor, B: Tensor, seed: int) -> None:
        super().__init__(method, layout, A=A, B=B)
        self.exact = method.branch == "float32"
        smaller = min(layout.out_features, layout.in_features)
        width = method.directions if method.budget == "layer" else min(WIDEST * method.directions, smaller)
        self.register_parameter("d", nn.Parameter(torch.zeros(width)))
        self.register_buffer("U", torch.zeros(layout.out_features, width))
        self.register_buffer("V", torch.zeros(layout.in_features, width))
        self.register_buffer("picked", torch.full((width,), -1))
        self.register_buffer("seed", torch.tensor(seed))

    @torch.no_grad()
    def launch(self, bases: CoreBases, picked: Tensor) -> None:
        """Give coordinates, zero now, to these of the core directions."""
        count = len(picked)
        self.U[:, :count] = bases.U[:, picked].to(self.U)
        self.V[:, :count] = bases.V[:, picked].to(self.V)
        self.picked[:count] = picked.to(self.picked)

    def pair(self) -> tuple[Tensor, Tensor]:
        # d stands with V: a direction that hardly changes W is then hardly read, as the nulls of `analyze` take A.
        return torch.cat([self.A, self.d[:, None] * self.V.T]), torch.cat([self.method.scale * self.B, self.U], 1)

    def rank_and_alpha(self) -> tuple[int, float]:
        return self.method.rank, self.method.alpha

    def branch(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # Directions are of W itself, so they read x as W does: nothing of it is dropped.
        factors = self.read(self.dropped(x), weight, self.A, self.method.scale * self.B)
        return factors + self.read(x, weight, self.V.T, self.U * self.d)


def _dash(site: Site) -> DashDelta:
    assert isinstance(site.delta, DashDelta), site.path
    return site.delta


def _launched(sites: Sequence[Site]) -> bool:
    """Whether the directions are chosen: of all weights at once, though with one budget some get none."""
    return any(bool((_dash(site).picked >= 0).any()) for site in sites)


def _misfit(site: Site) -> float:
    """The largest ‖W v − u (uᵀ W v)‖ of a weight's directions, over ‖W‖/√in, the mean of ‖W v‖ over all v."""
    delta, W = _dash(site), wide(_matrix(site))
    WV = W @ delta.V.to(W)
    U = delta.U.to(W)
    return float((WV - U * (U * WV).sum(0)).norm(dim=0).max() / (W.norm() / math.sqrt(W.shape[1])).clamp_min(1e-30))


def _matrix(site: Site) -> Tensor:
    return site.delta.layout.matrix(site.weight)


def _rates(site: Site, bases: CoreBases) -> Tensor:
    delta = _dash(site)
    return change_rates(bases, delta.method.scale * wide(delta.B.detach()), wide(delta.A.detach()))


def _picked(method: Dash, site: Site, bases: CoreBases) -> Tensor:
    """All core directions of a weight, the ones to be chosen first."""
    n = len(bases.sigma)
    if method.pick == "random":
        return torch.randperm(n, generator=torch.Generator().manual_seed(int(_dash(site).seed)))
    if method.pick == "change-rate":
        return _rates(site, bases).argsort(descending=True, stable=True)
    return torch.arange(n) if method.pick == "largest" else torch.arange(n).flip(0)


def _warn_of_unchanged(step: int, sites: Sequence[Site]) -> None:
    """Say where ΔW, and so every rate, is 0: the learning rate was, or no token went to this expert."""
    still = [site.path for site in sites if not (_dash(site).A.any() and _dash(site).B.any())]
    if still:
        log.warning(
            "LoRA-Dash: %d of %d weights have not changed by step %d, the first %s: which of their directions are "
            "taken means nothing. Raise warm_up_steps, or leave these weights out",
            len(still), len(sites), step, still[0],
        )  # fmt: skip


def _launch_by_model(budget: int, sites: Sequence[Site]) -> None:
    """Give the budget to the directions that change most, whichever weights they are of."""
    rates = []
    for at, site in enumerate(sites):
        own = _rates(site, core_bases(_matrix(site)))
        best = own.topk(min(len(_dash(site).d), len(own)))
        rates += [(float(rate), at, int(index)) for rate, index in zip(best.values, best.indices, strict=True)]
    chosen: dict[int, list[int]] = {}
    for _, at, index in sorted(rates, key=lambda r: -r[0])[:budget]:
        chosen.setdefault(at, []).append(index)
    for at, site in enumerate(sites):
        indices = torch.tensor(chosen.get(at, []), dtype=torch.int64)
        _dash(site).launch(core_bases(_matrix(site)), indices)
