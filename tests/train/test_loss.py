"""The loss and its gradient, against a reference written out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import trimtab
from tiny_training import VOCABULARY, make_examples, make_llama
from trimtab.data.batch import pad
from trimtab.data.encode import Example
from trimtab.errors import UsageError
from trimtab.models.readout import readout_of
from trimtab.train.loss import causal_loss, mean_loss, refuse_not_causal
from trimtab.train.packing import PAD, packing_for
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


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("name", ["pad", "pack", "tree"])
def test_padded_packed_and_accumulated_equal_the_reference(adapter, examples, name, micro_batch):
    model = adapter.model
    # three more that begin as the first does, one of them a prefix of it and one the same
    first = examples[0]
    for ids in (first.input_ids[:3], first.input_ids, [*first.input_ids[:-2], 1, 2, 3]):
        examples.append(Example(ids, [True] * len(ids), 90 + len(ids), 0, False))
    packing = packing_for(adapter, name, examples)
    options = Settings(batch_size=len(examples), micro_batch=micro_batch)
    parts = micro_batches(examples, range(len(examples)), options, packing)
    supervised = sum(part.supervised_tokens for part in parts)
    with packing.on(model):
        losses = [causal_loss(model, part) / supervised for part in parts]
        got = sum(gradient(adapter, loss) for loss in losses)
    wanted = reference(model, examples)
    assert sum(losses).item() == pytest.approx(wanted.item(), rel=ROUNDING)
    expected = gradient(adapter, wanted)
    assert (got - expected).norm() < ROUNDING * expected.norm()


def test_weighting_by_examples_instead_would_show(adapter, examples):
    by_example = sum(reference(adapter.model, [example]) for example in examples) / len(examples)
    assert abs(by_example - reference(adapter.model, examples)) > 10 * ROUNDING


def test_the_padding_token_does_not_matter(adapter, examples):
    losses = [causal_loss(adapter.model, pad(examples, pad_id)).item() for pad_id in (0, 7)]
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)


def test_only_positions_that_predict_go_through_the_head(llama, examples):
    batch, rows = pad(examples, 0), []
    hook = llama.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    adapter = trimtab.attach(llama, trimtab.LoRA(rank=2), targets=["lm_head"])
    readout_of(llama)  # which tries the head out
    rows.clear()
    causal_loss(llama, batch)
    hook.remove()
    adapter.remove()
    assert sum(rows) == len(batch.targets) < batch.input_ids.numel()


def test_no_logits_are_kept_for_backward(adapter, examples):
    batch, shapes = pad(examples, 0), []

    def note(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    readout_of(adapter.model)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        causal_loss(adapter.model, batch)
    assert shapes
    assert not [shape for shape in shapes if shape[-1] == VOCABULARY]


def test_a_head_put_in_later_is_the_one_that_is_used(llama, examples):
    batch = pad(examples, 0)
    with torch.no_grad():
        before = causal_loss(llama, batch).item()
        llama.set_output_embeddings(torch.nn.Linear(16, VOCABULARY, bias=False))
        after = causal_loss(llama, batch).item()
        wanted = reference(llama, examples).item() * batch.supervised_tokens
    assert after == pytest.approx(wanted, rel=ROUNDING)
    assert after != pytest.approx(before, rel=1e-2)


def _hooked(head):
    head.register_forward_hook(lambda module, given, out: 3 * out)


def _hooked_before(head):
    head.register_forward_pre_hook(lambda module, given: (3 * given[0],))


def _with_a_forward_of_its_own(head):
    own = head.forward
    head.forward = lambda x: 3 * own(x)


@pytest.mark.parametrize("change", [_hooked, _hooked_before, _with_a_forward_of_its_own])
def test_what_is_done_to_a_frozen_head_is_in_the_loss(llama, examples, change):
    found = trimtab.attach(llama, trimtab.LoRA(rank=2), targets=["q_proj"])
    readout_of(llama)
    change(llama.lm_head)
    expected = reference(llama, examples)
    batch = pad(examples, 0)
    loss = causal_loss(llama, batch) / batch.supervised_tokens
    assert loss.item() == pytest.approx(expected.item(), rel=ROUNDING)
    ours, own = gradient(found, loss), gradient(found, expected)
    assert (ours - own).norm() < ROUNDING * own.norm()


def test_logits_a_little_off_are_not_taken_for_the_heads(llama, caplog):
    own = llama.forward

    def forward(*given, **named):
        out = own(*given, **named)
        out.logits = 1.008 * out.logits
        return out

    llama.forward = forward
    assert readout_of(llama) is None
    assert "its logits are not its head's" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_that_small_logits_do_not_show_is_seen(llama, dtype):
    own = llama.to(dtype).forward

    def forward(*given, **named):
        out = own(*given, **named)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    with torch.no_grad():
        llama.lm_head.weight.mul_(1e-2)
    llama.forward = forward
    assert readout_of(llama) is None


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_logit_that_is_never_taken_is_in_the_loss(llama, value):
    own = llama.forward

    def forward(*given, **named):
        out = own(*given, **named)
        out.logits = torch.where(torch.arange(out.logits.shape[-1]) == 3, value, out.logits)
        return out

    llama.forward = forward
    assert readout_of(llama) is None


def test_an_adapter_of_the_head_that_is_not_active_takes_no_part(llama, examples):
    batch = pad(examples, 0)
    first = trimtab.attach(llama, trimtab.LoRA(rank=2), targets=["lm_head"], name="first")
    alone = gradient(first, causal_loss(llama, batch))
    second = trimtab.attach(llama, trimtab.LoRA(rank=2), targets=["lm_head"], name="second")
    second.disable()
    first.enable()
    assert torch.equal(gradient(first, causal_loss(llama, batch)), alone)


def test_a_model_that_counts_positions_in_a_way_of_its_own_does_so():
    from transformers import RobertaConfig, RobertaForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = RobertaConfig(**sizes, num_attention_heads=4, is_decoder=True, pad_token_id=1, initializer_range=0.3)
    torch.manual_seed(0)
    model = RobertaForCausalLM(config).eval()  # the first token is at position 2
    examples = [dataclasses.replace(e, input_ids=[5 if i == 1 else i for i in e.input_ids]) for e in make_examples()]
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2), targets=["query"])
    for name in ("pad", "auto"):
        packing = packing_for(adapter, name, examples)
        (batch,) = micro_batches(examples, range(len(examples)), Settings(batch_size=len(examples)), packing, 1)
        with torch.no_grad(), packing.on(model):
            ours = causal_loss(model, batch).item() / batch.supervised_tokens
        assert ours == pytest.approx(reference(model, examples).item(), rel=ROUNDING)


def test_a_batch_without_targets_has_loss_zero_and_gradients_of_zero(adapter):
    silent = pad([Example([1, 2, 3], [True, False, False], 1, 0, False)], 0)
    loss = causal_loss(adapter.model, silent)
    assert loss.item() == 0
    assert gradient(adapter, loss).abs().max() == 0


def test_evaluation_is_the_mean_over_tokens_and_not_over_batches(llama, examples):
    batches = eval_batches(examples, Settings(batch_size=3), PAD)
    assert len(batches) == 4
    with torch.no_grad():
        assert mean_loss(llama, batches) == pytest.approx(reference(llama, examples).item(), rel=ROUNDING)


def test_evaluation_restores_each_modules_own_mode(llama, examples):
    llama.train()
    llama.model.layers[0].eval()
    modes = [module.training for module in llama.modules()]
    mean_loss(llama, eval_batches(examples, Settings(), PAD))
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
