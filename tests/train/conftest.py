"""Tiny random models and token sequences, so that a training step takes milliseconds."""

from __future__ import annotations

import pytest
import torch

from tiny_training import Stopped, make_examples, make_llama


@pytest.fixture
def llama():
    """A random two-layer Llama in fp32."""
    return make_llama()


@pytest.fixture
def examples():
    """Ten seeded sequences of 4 to 13 tokens, each with targets."""
    return make_examples()


@pytest.fixture
def run():
    """run(out=None, ...): a fresh adapter on a fresh model, trained. Returns (state, result, reports)."""
    import trimtab
    from trimtab.train.loss import causal_loss
    from trimtab.train.settings import Settings

    def call(
        out=None,
        *,
        method=None,
        examples=None,
        eval_examples=(),
        resume=False,
        stop=None,
        llama=None,
        loss=causal_loss,
        **settings,
    ):
        model = make_llama() if llama is None else llama
        options = Settings(**{"batch_size": 3, "lr": 1e-2, "seed": 5, **settings})
        adapter = trimtab.attach(model, method or trimtab.LoRA(rank=2, alpha=4), seed=options.seed)
        reports = []

        def on_step(report):
            reports.append(report)
            if report.step == stop:
                raise Stopped

        data = make_examples() if examples is None else examples
        result = trimtab.fit(
            adapter, data, options, eval_examples=eval_examples, out=out, resume=resume, on_step=on_step, loss=loss
        )
        return {key: tensor.clone() for key, tensor in adapter.state_dict().items()}, result, reports

    return call


@pytest.fixture
def stopped():
    """The error that `run(stop=STEP)` ends with."""
    return Stopped


@pytest.fixture
def same():
    """same(a, b): whether two states have the same tensors, bit for bit."""

    def compare(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return compare
