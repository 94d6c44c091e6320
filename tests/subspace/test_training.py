from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.subspace.projection import make_projection
from trimtab.subspace.subject import of_problem
from trimtab.subspace.training import has_diverged, score_start, train
from trimtab.tasks.problem import Problem, Protocol, Split
from trimtab.tasks.problems import make_problem
from trimtab.tasks.vision import accuracy, fully_connected


class Dense:
    """P with independent normal entries and columns of norm 1, as a matrix."""

    def __init__(self, sizes, d, seed=0, dtype=torch.float32):
        P = torch.randn(sum(sizes), d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        self.P, self.sizes, self.D, self.d = P / P.norm(dim=0), tuple(sizes), sum(sizes), d

    def expand(self, theta_d):
        return self.P @ theta_d

    def adjoint(self, g):
        return self.P.T @ g


def clusters(protocol, *, seed=0, spread=1.5):
    """Three classes of points in a plane of 6 dimensions, and a net 6-8-3: small enough to check step by step."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 6, generator=generator) * 2
    targets = torch.arange(90) % 3
    inputs = centres[targets] + spread * torch.randn(90, 6, generator=generator)
    splits = [
        Split(name, inputs[part], targets[part]) for name, part in zip("abc", torch.arange(90).split(30), strict=True)
    ]
    return Problem(
        "clusters",
        "accuracy",
        1 / 3,
        *splits,
        scored="test",
        make_model=lambda start: fully_connected((6, 8, 3), start),
        loss=nn.functional.cross_entropy,
        score=accuracy,
        defaults=protocol,
    )


ADAM = Protocol(epochs=3, batch_size=7, lr=1e-2, l2=1e-2)
SGD = dataclasses.replace(ADAM, optimizer="sgd", lr=5e-2)


def by_hand(problem, protocol, seed, subspace, batches):
    """θ_d after the batches, and the losses: autograd through θ0 + P θ_d and the written-out L2 term."""
    net = problem.make_model(seed)
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    theta_d = nn.Parameter(torch.zeros(subspace.d))
    kind = torch.optim.Adam if protocol.optimizer == "adam" else torch.optim.SGD
    more = {"betas": protocol.betas} if protocol.optimizer == "adam" else {"momentum": protocol.momentum}
    optimizer = kind([theta_d], lr=protocol.lr, **more)
    for rows in batches:
        pieces = (start + subspace.P @ theta_d).split(list(problem.sizes))
        parameters = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        outputs = torch.func.functional_call(net, parameters, (problem.train.inputs[rows],))
        loss = problem.loss(outputs, problem.train.targets[rows])
        decayed = [p for p in parameters.values() if protocol.l2_on == "all" or p.ndim > 1]
        optimizer.zero_grad()
        (loss + protocol.l2 * sum(p.square().sum() for p in decayed)).backward()
        optimizer.step()
    pieces = (start + subspace.P @ theta_d).detach().split(list(problem.sizes))
    parameters = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
    return float(
        problem.loss(torch.func.functional_call(net, parameters, (problem.train.inputs,)), problem.train.targets)
    )


@pytest.mark.parametrize("protocol", [ADAM, SGD, dataclasses.replace(ADAM, l2_on="all", l2=0.1)])
def test_a_run_is_gradient_descent_on_theta_d_with_l2_on_the_full_theta(protocol):
    # One batch is all of the data, so that the order does not matter to rounding beyond the sums.
    problem = clusters(dataclasses.replace(protocol, batch_size=30, epochs=12))
    subspace = Dense(problem.sizes, 9)
    outcome = train(problem, seed=1, subspace=subspace)
    expected = by_hand(problem, problem.defaults, 1, subspace, [torch.arange(30)] * 12)
    assert outcome.final_loss == pytest.approx(expected, rel=1e-4)  # fp32, 12 steps, sums in another order
    assert outcome.final_loss < 0.97 * outcome.first_loss
    assert (outcome.steps, outcome.d) == (12, 9)


def test_the_identity_as_projection_is_direct_training():
    problem = clusters(ADAM)
    identity = Dense(problem.sizes, problem.D)
    identity.P = torch.eye(problem.D)
    direct, within = train(problem, seed=0), train(problem, seed=0, subspace=identity)
    assert within.final_loss == pytest.approx(direct.final_loss, rel=1e-4)
    assert direct.d == within.d == problem.D


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    problem = clusters(ADAM)
    subspace = Dense(problem.sizes, 5)
    first, again, other = (train(problem, seed=seed, subspace=subspace) for seed in (4, 4, 5))
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(again, seconds=0)
    assert first.first_loss != other.first_loss
    assert first.final_loss != other.final_loss


def test_the_order_of_the_data_follows_the_seed_too():
    problem = clusters(ADAM)
    one_start = dataclasses.replace(problem, make_model=lambda seed: fully_connected((6, 8, 3), 0))
    first, other = (train(one_start, seed=seed) for seed in (0, 1))
    assert first.first_loss == other.first_loss
    assert first.final_loss != other.final_loss


def test_a_net_that_is_trained_leaves_the_problem_as_it_was():
    problem = clusters(ADAM)
    before = problem.train.inputs.clone()
    random = torch.get_rng_state()
    train(problem, seed=0)
    assert torch.equal(problem.train.inputs, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_epochs_are_told_with_their_mean_loss():
    problem = clusters(dataclasses.replace(SGD, batch_size=30, lr=1e-3))
    told = []
    outcome = train(problem, seed=0, on_epoch=lambda epoch, loss: told.append((epoch, loss)))
    assert [epoch for epoch, _ in told] == [1, 2, 3]
    assert told[0][1] == pytest.approx(outcome.first_loss, rel=1e-5)  # one batch an epoch, before its step
    assert told[0][1] > told[1][1] > told[2][1] > outcome.final_loss


def test_a_rate_that_makes_the_loss_no_number_is_noticed_and_ends_the_run():
    problem = clusters(dataclasses.replace(SGD, epochs=50))
    told = []
    outcome = train(problem, seed=0, lr=1e12, on_epoch=lambda epoch, loss: told.append(epoch))
    assert outcome.diverged
    assert len(told) < 50
    assert outcome.lr == 1e12


def test_ending_worse_than_it_began_is_divergence_even_with_numbers():
    problem = clusters(dataclasses.replace(ADAM, l2=0.0))
    outcome = train(problem, seed=0, lr=30.0)
    assert math.isfinite(outcome.final_loss)
    assert outcome.final_loss > outcome.first_loss
    assert outcome.diverged


def test_learning_little_is_not_divergence():
    problem = clusters(ADAM)
    assert not train(problem, seed=0, subspace=Dense(problem.sizes, 1), lr=1e-3).diverged


def test_divergence_is_above_the_loss_of_guessing_too():
    assert not has_diverged(0.05, 0.7, guessing=math.log(2))
    assert has_diverged(0.05, 0.75, guessing=math.log(2))
    assert has_diverged(0.05, 0.7)
    assert has_diverged(0.7, math.nan)
    assert has_diverged(0.7, math.inf)


def test_the_start_is_scored_as_it_is():
    problem = clusters(ADAM)
    start, still = score_start(problem, 3), train(problem, seed=3, subspace=Dense(problem.sizes, 1), lr=1e-12)
    assert (start.train, start.test) == (still.train, still.test)
    assert (start.d, start.steps, start.seed) == (0, 0, 3)
    assert start.first_loss == start.final_loss == still.first_loss


def test_a_projection_of_another_net_is_refused():
    problem = clusters(ADAM)
    with pytest.raises(UsageError, match="make it with the problem's sizes"):
        train(problem, seed=0, subspace=Dense((10, 5), 3))


def test_a_net_without_trainable_parameters_is_refused():
    frozen = dataclasses.replace(
        clusters(ADAM), make_model=lambda seed: fully_connected((6, 3), seed).requires_grad_(False)
    )
    with pytest.raises(UsageError, match="clusters has no trainable parameters"):
        train(frozen, seed=0)
    with pytest.raises(UsageError, match="clusters has no trainable parameters"):
        of_problem(lambda: frozen, lambda protocol: protocol, "uni", {})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_toy_is_solved_directly(seed):
    outcome = train(make_problem("toy"), seed=seed)
    assert outcome.test > 1 - 1e-6
    assert not outcome.diverged


def test_the_toy_needs_ten_dimensions_exactly():
    toy = make_problem("toy")
    scores = {d: [train(toy, seed=s, subspace=Dense(toy.sizes, d, s)).test for s in range(3)] for d in (9, 10, 11)}
    assert sum(scores[9]) / 3 < 0.9
    assert min(scores[10] + scores[11]) > 1 - 1e-3  # fp32: ten equations, badly conditioned in some subspaces


def test_all_dimensions_reach_the_direct_baseline_on_the_digits():
    pytest.importorskip("sklearn", reason="scikit-learn, which carries the digits, is not installed")
    problem = make_problem("digits", hidden=8)  # D = 610
    quick = dataclasses.replace(problem.defaults, epochs=25, lr=1e-2)
    square = make_projection("uni", problem.sizes, problem.D, 0)  # a signed permutation, which Adam does not notice
    direct, full = train(problem, quick, seed=0), train(problem, quick, seed=0, subspace=square)
    few = train(problem, quick, seed=0, subspace=Dense(problem.sizes, 2), lr=1e-2 * math.sqrt(problem.D / 2))
    assert direct.test > 0.85
    assert full.test > direct.test - 0.02  # 400 images: what rounds otherwise may turn a few of them
    assert few.test < 0.5
