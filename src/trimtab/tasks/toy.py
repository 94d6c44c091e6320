"""Li et al.'s toy problem, whose intrinsic dimension is known by construction."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trimtab.tasks.problem import SPLITS, Problem, Protocol, Split, seed_for

GROUPS, MEMBERS = 10, 100

PROTOCOL = Protocol(epochs=5, batch_size=GROUPS, optimizer="lbfgs", lr=1.0, l2=0.0)
"""L-BFGS over all ten equations at once: a linear system in a random subspace may be conditioned badly, and what is
measured is whether it has a solution, not how fast a gradient finds it."""


class Groups(nn.Module):
    """One vector θ of 1000 entries, which start from N(0, 1/1000); an output is the sum of the group its row names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        size = GROUPS * MEMBERS
        start = torch.randn(size, generator=torch.Generator().manual_seed(seed_for(seed, "start")))
        self.theta = nn.Parameter(start / math.sqrt(size))

    def forward(self, inputs: Tensor) -> Tensor:
        # inputs: [rows, 1000] -> [rows]
        return inputs @ self.theta


def toy() -> Problem:
    """D = 1000 in 10 groups of 100, group i to sum to i, squared error, performance exp(−loss).

    Li et al. 2018, arXiv 1804.08838, §2: ten independent equations, so that exactly ten dimensions are needed to solve
    it. The three splits are the same ten equations.
    """
    inputs = torch.eye(GROUPS).repeat_interleave(MEMBERS, dim=1)
    targets = torch.arange(1, GROUPS + 1, dtype=torch.float32)
    split = Split("the ten equations", inputs, targets)
    return Problem(
        name="toy",
        metric="exp(-loss)",
        chances=dict.fromkeys(SPLITS, performance(torch.zeros(GROUPS), targets)),
        train=split,
        validation=split,
        test=split,
        scored="test",
        make_model=Groups,
        loss=squared_error,
        score=performance,
        defaults=PROTOCOL,
    )


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum of squared differences over the equations."""
    return (outputs - targets).square().sum()


def performance(outputs: Tensor, targets: Tensor) -> float:
    """exp(−loss): 1 where every group has its sum, next to 0 at the start; 0 where the loss is no number."""
    loss = squared_error(outputs, targets).item()
    return 0.0 if math.isnan(loss) else math.exp(-loss)
