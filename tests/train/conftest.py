"""Tiny random models and token sequences, so that a training step takes milliseconds."""

from __future__ import annotations

import random

import pytest
import torch

VOCABULARY = 61


def make_llama(seed=0, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
        }
        return LlamaForCausalLM(LlamaConfig(**{**config, **options})).eval()


def make_examples(count=10, seed=0, longest=14):
    from trimtab.data.encode import Example

    draw = random.Random(seed)
    found = []
    for row in range(1, count + 1):
        length = draw.randrange(4, longest)
        ids = [draw.randrange(VOCABULARY) for _ in range(length)]
        # From 1 target to nearly all, so that means over examples and over tokens differ.
        found.append(Example(ids, [i >= draw.randrange(1, length) for i in range(length - 1)] + [True], row, 0, False))
    return found


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
    from trimtab.train.settings import Settings

    def call(
        out=None, *, method=None, examples=None, eval_examples=(), resume=False, stop=None, llama=None, **settings
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
            adapter, data, options, eval_examples=eval_examples, out=out, resume=resume, on_step=on_step
        )
        return {key: tensor.clone() for key, tensor in adapter.state_dict().items()}, result, reports

    return call


class Stopped(Exception):
    """Stands for whatever interrupts a run."""


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
