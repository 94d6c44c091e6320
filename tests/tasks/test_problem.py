from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.tasks.problem import Protocol, seed_for
from trimtab.tasks.problems import PROBLEMS, make_problem
from trimtab.tasks.toy import squared_error


def test_the_defaults_are_the_papers_for_mnist():
    protocol = Protocol()
    assert (protocol.epochs, protocol.batch_size, protocol.optimizer) == (100, 128, "adam")
    assert (protocol.lr, protocol.betas, protocol.l2, protocol.l2_on) == (1e-3, (0.9, 0.99), 1e-4, "kernels")


def test_every_wrong_value_of_a_protocol_is_told_at_once():
    with pytest.raises(UsageError) as told:
        Protocol(epochs=0, lr=-1, optimizer="adamw", l2=float("nan"), l2_on="weights", betas=(0.9, 1.0))
    for name in ("epochs", "lr", "optimizer", "l2 is", "l2_on", "betas"):
        assert name in str(told.value)


def test_streams_of_one_seed_differ_by_purpose_and_repeat():
    assert seed_for(3, "start") == seed_for(3, "start")
    assert len({seed_for(seed, purpose) for seed in range(20) for purpose in ("start", "order")}) == 40
    torch.Generator().manual_seed(seed_for(2**40, "start"))  # fits what torch takes
    with pytest.raises(UsageError, match="at least 0"):
        seed_for(-1, "start")


def test_an_unknown_problem_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean mnist-lenet"):
        make_problem("mnist-lennet")
    with pytest.raises(UsageError, match=", ".join(PROBLEMS)):
        make_problem("x")


def test_an_option_a_problem_does_not_have_is_refused():
    with pytest.raises(UsageError, match=r"did you mean width\?; it takes width, depth"):
        make_problem("mnist-fc", widht=100)
    with pytest.raises(UsageError, match="it takes none"):
        make_problem("toy", width=100)


def test_the_list_of_problems_needs_no_torch():
    code = "import sys, trimtab.tasks.problems, trimtab.tasks.problem; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_toy_is_ten_groups_of_a_hundred():
    toy = make_problem("toy")
    assert toy.sizes == (1000,)
    assert toy.chance < 1e-100
    theta = torch.arange(1, 11).repeat_interleave(100) / 100
    net = toy.make_model(0)
    net.theta.requires_grad_(False).copy_(theta)
    assert toy.score(net(toy.test.inputs), toy.test.targets) == pytest.approx(1, abs=1e-6)
    net.theta[250] += 2  # the third group is 2 too much
    assert float(squared_error(net(toy.test.inputs), toy.test.targets)) == pytest.approx(4, rel=1e-5)


def test_the_toys_start_depends_on_the_seed_alone():
    toy = make_problem("toy")
    assert torch.equal(toy.make_model(1).theta, toy.make_model(1).theta)
    assert not torch.equal(toy.make_model(1).theta, toy.make_model(2).theta)
