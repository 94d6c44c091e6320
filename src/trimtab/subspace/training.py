"""Training one net directly, or in a random subspace of its parameters: θ = θ0 + P θ_d.

One run at a time: a search asks for a few seeds at once and trains them in processes of their own. Four runs stacked
under vmap took 0.6 of the time a run on the digits' net, 0.9 on MNIST's fully connected one and 1.3 on LeNet, on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.tasks.problem import Problem, Protocol, Split, seed_for

if TYPE_CHECKING:
    from trimtab.subspace.projection import Projection

SCORED_ROWS = 1000
"""So many examples are scored at once: their activations stay in the cache."""

RISEN = 1.05
"""A run has diverged whose loss ends above so many times what it began with, or what guessing has. One that learns
nothing ends at the loss of guessing, which is about where a net begins that knows nothing, a little above or below."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to, at the end of its last epoch.

    d: dimensions trained; D for a direct run. train, validation, test: scores. first_loss, final_loss: means over the
    training split before and after, without the L2 term. seconds: training alone, without scoring.
    diverged: see `has_diverged`; the scores are of where it stopped. A run that merely learned nothing has not
    diverged: compare its score with the problem's chance.
    """

    seed: int
    d: int
    lr: float
    train: float
    validation: float
    test: float
    first_loss: float
    final_loss: float
    seconds: float
    steps: int
    diverged: bool


def train(
    problem: Problem,
    protocol: Protocol | None = None,
    *,
    seed: int,
    subspace: Projection | None = None,
    lr: float | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Outcome:
    """Train a net from a start and in an order of the data that `seed` gives, and score it on every split.

    subspace: P, made for `problem.sizes`; θ_d starts at 0 and alone is trained. None: all D parameters are.
    protocol: by default the problem's own. lr: in place of the protocol's. L2 is of the full θ in both cases.
    on_epoch(epochs done, mean loss of the epoch). Raises UsageError for a projection of another net, and for a net
    without trainable parameters.
    """
    protocol = protocol or problem.defaults
    rate = protocol.lr if lr is None else lr
    run = _Run(problem, protocol, seed, subspace)
    first_loss = run.mean_loss()
    optimizer = optimizer_for(protocol, run.trained, rate)
    order = torch.Generator().manual_seed(seed_for(seed, "order"))
    begun, steps = time.perf_counter(), 0
    for epoch in range(1, protocol.epochs + 1):
        total = 0.0
        for rows in torch.split(torch.randperm(len(problem.train), generator=order), protocol.batch_size):
            total += _step(optimizer, partial(run.gradient, rows)) * len(rows)
            steps += 1
        mean = total / len(problem.train)
        if on_epoch is not None:
            on_epoch(epoch, mean)
        if not math.isfinite(mean):
            break
    seconds = time.perf_counter() - begun
    run.place()
    final_loss = run.mean_loss()
    return Outcome(
        seed=seed,
        d=run.trained.numel(),
        lr=rate,
        **run.scores(),
        first_loss=first_loss,
        final_loss=final_loss,
        seconds=seconds,
        steps=steps,
        diverged=has_diverged(first_loss, final_loss),
    )


def score_start(problem: Problem, seed: int) -> Outcome:
    """The outcome of no training at all: θ0 as `seed` draws it, d = 0."""
    run = _Run(problem, problem.defaults, seed, None)
    loss = run.mean_loss()
    return Outcome(
        seed=seed,
        d=0,
        lr=0.0,
        **run.scores(),
        first_loss=loss,
        final_loss=loss,
        seconds=0.0,
        steps=0,
        diverged=False,
    )


def has_diverged(first_loss: float, final_loss: float, guessing: float = 0.0) -> bool:
    """Whether the loss ended as no number, or clearly higher than it began (RISEN). guessing: its loss, for a net that
    may know more than that when it begins, and then forget it without diverging."""
    return not final_loss <= RISEN * max(first_loss, guessing)


def _step(optimizer: torch.optim.Optimizer, gradient: Callable[[], float]) -> float:
    """The loss before the step; infinite where the step is larger than a number can be."""
    try:
        return optimizer.step(gradient)
    except RuntimeError as error:
        if "without overflow" not in str(error):  # torch refuses to multiply by a rate beyond its dtype
            raise
        return math.inf


def optimizer_for(protocol: Protocol, trained: nn.Parameter, lr: float) -> torch.optim.Optimizer:
    """The protocol's optimizer over one vector. L-BFGS takes the batch as the whole data: it searches along lines."""
    if protocol.optimizer == "adam":
        return torch.optim.Adam([trained], lr=lr, betas=protocol.betas, fused=True)
    if protocol.optimizer == "sgd":
        return torch.optim.SGD([trained], lr=lr, momentum=protocol.momentum, fused=True)
    return torch.optim.LBFGS([trained], lr=lr, max_iter=100, line_search_fn="strong_wolfe")


class _Run:
    """A net whose parameters are views of one vector θ, and the vector that is trained: θ itself, or θ_d.

    The gradient of θ is taken at θ and brought to θ_d by the adjoint of P, so that autograd sees the plain net.
    """

    def __init__(self, problem: Problem, protocol: Protocol, seed: int, subspace: Projection | None) -> None:
        sizes = problem.sizes
        if subspace is not None and tuple(subspace.sizes) != sizes:
            raise UsageError(
                f"the projection is for tensors of {tuple(subspace.sizes)} entries, but {problem.name} has {sizes}: "
                "make it with the problem's sizes"
            )
        self.problem, self.subspace = problem, subspace
        self.net = problem.make_model(seed)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.start = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.theta = self.start.clone()
        views = torch.split(self.theta, list(sizes))
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view.view_as(parameter)
        self.trained = nn.Parameter(self.theta if subspace is None else torch.zeros(subspace.d))
        decayed = [i for i, p in enumerate(self.parameters) if protocol.l2_on == "all" or p.ndim > 1]
        self.decayed, self.l2 = (decayed if protocol.l2 else []), protocol.l2
        self.pieces = [views[i] for i in self.decayed]

    def place(self) -> None:
        """Put the net at θ = θ0 + P θ_d."""
        if self.subspace is not None:
            with torch.no_grad():
                torch.add(self.start, self.subspace.expand(self.trained.detach()), out=self.theta)

    def gradient(self, rows: Tensor) -> float:
        """Leave the gradient of the loss on these rows of the training split; the loss without its L2 term."""
        split = self.problem.train
        self.place()
        with torch.enable_grad():
            outputs = self.net(split.inputs.index_select(0, rows))
            loss = self.problem.loss(outputs, split.targets.index_select(0, rows))
            gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            if self.decayed:
                pieces = torch.split(flat, list(self.problem.sizes))
                torch._foreach_add_([pieces[i] for i in self.decayed], self.pieces, alpha=2 * self.l2)
            self.trained.grad = flat if self.subspace is None else self.subspace.adjoint(flat)
        return loss.item()

    @torch.no_grad()
    def outputs(self, split: Split) -> Tensor:
        """The net's outputs on all of a split, in evaluation mode."""
        self.net.eval()
        made = torch.cat([self.net(part) for part in torch.split(split.inputs, SCORED_ROWS)])
        self.net.train()
        return made

    def mean_loss(self) -> float:
        """The loss over the training split, without the L2 term."""
        return float(self.problem.loss(self.outputs(self.problem.train), self.problem.train.targets))

    def scores(self) -> dict[str, float]:
        """The score on each split."""
        return {
            name: self.problem.score(self.outputs(split), split.targets) for name, split in self.problem.splits.items()
        }
