"""The loss and its gradient, against a reference written out by hand."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import make_examples, make_llama

import trimtab
from trimtab.data.batch import pack, pad
from trimtab.errors import UsageError
from trimtab.train.loss import causal_loss, mean_loss, refuse_leaky_packing, refuse_not_causal
from trimtab.train.plan import eval_batches, micro_batches
from trimtab.train.settings import Settings

ROUNDING = 1e-4  # fp32 sums in another order differ by a few units in the seventh digit, gradients by some more


@pytest.fixture
def adapter(llama):
    found = trimtab.attach(llama, trimtab.LoRA(rank=2, alpha=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


def reference(model, examples):
    """Mean negative log-likelihood over every supervised token, one example at a time, one token at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        logits = model(torch.tensor([example.input_ids])).logits[0].double()
        for i in range(1, len(example.input_ids)):
            if example.supervised[i]:
                total = total - logits[i - 1].log_softmax(-1)[example.input_ids[i]]
                count += 1
    return total / count


def gradient(adapter, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, adapter.parameters())])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": "pack"},
        {"micro_batch": 1},
        {"micro_batch": 3},
        {"micro_batch": 3, "packing": "pack"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "padded",
)
def test_padded_packed_and_accumulated_equal_the_reference(adapter, examples, options):
    model = adapter.model
    parts = micro_batches(examples, range(len(examples)), Settings(batch_size=len(examples), **options), pad_id=0)
    supervised = sum(part.supervised_tokens for part in parts)
    losses = [causal_loss(model, part) / supervised for part in parts]
    wanted = reference(model, examples)
    assert sum(losses).item() == pytest.approx(wanted.item(), rel=ROUNDING)
    got = sum(gradient(adapter, loss) for loss in losses)
    expected = gradient(adapter, wanted)
    assert (got - expected).norm() < ROUNDING * expected.norm()


def test_weighting_by_examples_instead_would_show(adapter, examples):
    by_example = sum(reference(adapter.model, [example]) for example in examples) / len(examples)
    assert abs(by_example - reference(adapter.model, examples)) > 10 * ROUNDING


def test_the_padding_token_does_not_matter(adapter, examples):
    losses = [causal_loss(adapter.model, pad(examples, pad_id)).item() for pad_id in (0, 7)]
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5))
def test_packed_equals_padded_whatever_the_examples(seed, count):
    model, found = make_llama(), make_examples(count, seed=seed)
    with torch.no_grad():
        assert causal_loss(model, pack(found, 0)).item() == pytest.approx(
            causal_loss(model, pad(found, 0)).item(), rel=ROUNDING
        )


def test_only_the_needed_columns_equal_all_logits(llama, examples):
    assert "logits_to_keep" in inspect.signature(type(llama).forward).parameters
    batch = pad(examples, 0)
    shapes = []

    class Whole(torch.nn.Module):  # a model that knows no logits_to_keep
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask, position_ids, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    hook = llama.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    with torch.no_grad():
        few, all_of_them = causal_loss(llama, batch), causal_loss(Whole(llama), batch)
    hook.remove()
    assert few.item() == pytest.approx(all_of_them.item(), rel=1e-6)
    needed = int((batch.labels[:, 1:] != -100).any(0).sum())
    assert shapes == [needed, batch.input_ids.shape[1]]
    assert needed < batch.input_ids.shape[1]


def test_examples_with_nothing_to_learn_take_no_computation(examples):
    from trimtab.data.encode import Example

    silent = Example([1, 2, 3], [True, False, False], 99, 0, False)  # a first token is never predicted
    parts = micro_batches([silent, *examples], range(3), Settings(), pad_id=0)
    assert [part.examples for part in parts] == [(1, 2)]


def test_evaluation_is_the_mean_over_tokens_and_not_over_batches(llama, examples):
    batches = eval_batches(examples, Settings(batch_size=3), 0)
    assert len(batches) == 4
    with torch.no_grad():
        assert mean_loss(llama, batches) == pytest.approx(reference(llama, examples).item(), rel=ROUNDING)


def test_evaluation_restores_each_modules_own_mode(llama, examples):
    llama.train()
    llama.model.layers[0].eval()
    modes = [module.training for module in llama.modules()]
    mean_loss(llama, eval_batches(examples, Settings(), 0))
    assert [module.training for module in llama.modules()] == modes


def test_a_model_that_sees_what_follows_is_refused():
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    bert = BertForMaskedLM(
        BertConfig(vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2))
    for model in (bert, t5):
        with pytest.raises(UsageError, match=f"{type(model).__name__} is no causal language model.*loss"):
            refuse_not_causal(model)
    refuse_not_causal(make_llama())


def test_packing_is_refused_where_examples_would_see_each_other():
    from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    refuse_leaky_packing(make_llama())
    refuse_leaky_packing(GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=32)))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3))
    with pytest.raises(UsageError, match=r"BloomForCausalLM cannot tell packed examples apart.*'pad'"):
        refuse_leaky_packing(bloom)
