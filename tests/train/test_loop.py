"""The training loop: what it learns, what it leaves alone, and that it does the same every time."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

import trimtab
from tiny_training import make_examples, make_llama
from trimtab.data.encode import Example
from trimtab.errors import UsageError
from trimtab.train.loss import causal_loss, mean_loss
from trimtab.train.packing import packing_for
from trimtab.train.plan import eval_batches
from trimtab.train.settings import Settings

ROUNDING = 1e-4  # fp32 gradients summed in another order, and Adam's division by their size

# Recorded from this loop after its gradients were checked against autograd in test_loss.py. Learning, data order,
# clipping and schedule all move it; 1e-4 leaves room for another processor's rounding only.
GOLDEN = [4.739087, 5.124106, 4.7274, 5.733625, 5.435793, 4.691161, 4.369818, 4.380745]


def losses(reports):
    return [report.loss for report in reports]


def test_the_loss_curve_is_the_recorded_one(run):
    _, result, reports = run(epochs=2, schedule="cosine", warm_up=0.25, clip=0.5, packing="pad")
    assert losses(reports) == pytest.approx(GOLDEN, rel=1e-4)
    tokens = sum(len(example.input_ids) for example in make_examples())
    assert result.real_tokens == 2 * tokens
    assert result.steps == 8


def test_the_mean_training_loss_is_over_tokens(run):
    _, result, reports = run()
    counts = [reports[0].supervised_tokens]
    counts += [b.supervised_tokens - a.supervised_tokens for a, b in itertools.pairwise(reports)]
    by_token = sum(loss * count for loss, count in zip(losses(reports), counts, strict=True)) / sum(counts)
    assert result.train_loss == pytest.approx(by_token)
    assert len(set(counts)) > 1
    assert result.supervised_tokens == sum(counts)


def test_examples_with_nothing_to_learn_change_nothing(run, caplog):
    wanted, *_ = run(batch_size=1, shuffle=False)
    silent = Example([1, 2, 3], [True, False, False], 99, 0, False)
    with caplog.at_level("INFO", logger="trimtab"):
        got, result, _ = run(examples=[silent, *make_examples(), silent], batch_size=1, shuffle=False)
    assert "2 of 12 examples have no supervised token" in caplog.text
    assert result.steps == 10
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    "options",
    [{"micro_batch": 1}, {"micro_batch": 2}, {"packing": "pack"}, {"packing": "pack", "micro_batch": 2}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_accumulating_and_packing_train_the_same(run, options):
    wanted, _, plain = run(epochs=2)
    got, _, reports = run(epochs=2, **options)
    assert losses(reports) == pytest.approx(losses(plain), rel=ROUNDING)
    # Adam divides by the gradient's size, so where that is near zero rounding decides the sign of a step.
    for key, tensor in wanted.items():
        assert (got[key] - tensor).norm() < 0.01 * tensor.norm()


def test_gradient_checkpointing_trains_the_same(run):
    wanted, _, plain = run()
    got, _, reports = run(gradient_checkpointing=True)
    assert losses(reports) == pytest.approx(losses(plain), rel=1e-6)
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=1e-6)


def test_one_step_is_adamw_with_clipping_and_decay(llama, examples):
    adapter = trimtab.attach(llama, trimtab.LoRA(rank=2), seed=3)
    start = [p.detach().clone() for p in adapter.parameters()]
    settings = Settings(batch_size=10, lr=0.01, clip=0.1, weight_decay=0.3, max_steps=1)
    reports = []
    trimtab.fit(adapter, examples, settings, on_step=reports.append)
    got = [p.detach().clone() for p in adapter.parameters()]
    for parameter, value in zip(adapter.parameters(), start, strict=True):
        parameter.data.copy_(value)
    from trimtab.data.batch import pad

    batch = pad(examples, 0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, weight_decay=0.3, foreach=False)
    (causal_loss(llama, batch) / batch.supervised_tokens).backward()
    norm = torch.cat([p.grad.flatten() for p in adapter.parameters()]).norm()
    assert norm > 0.1
    assert reports[0].grad_norm == pytest.approx(norm.item(), rel=ROUNDING)
    for parameter in adapter.parameters():
        parameter.grad.mul_(0.1 / norm)
    optimizer.step()
    for parameter, value in zip(adapter.parameters(), got, strict=True):
        torch.testing.assert_close(value, parameter.detach(), rtol=1e-3, atol=1e-4)


def test_weight_decay_shrinks_what_no_gradient_reaches(run):
    # A has no gradient while B is zero, so that in the first step decay alone moves it.
    start, _, _ = run(max_steps=1, lr=0.5)
    decayed, _, _ = run(max_steps=1, lr=0.5, weight_decay=0.4)
    keys = [key for key in start if key.endswith(".A")]
    assert keys
    for key in keys:
        torch.testing.assert_close(decayed[key], start[key] * (1 - 0.5 * 0.4))


def test_clipping_off_leaves_the_gradient_alone(run):
    _, _, loose = run(max_steps=2, clip=1e9)
    _, _, off = run(max_steps=2, clip=0)
    _, _, tight = run(max_steps=2, clip=1e-9)
    assert losses(off) == losses(loose)
    assert losses(off)[1] != losses(tight)[1]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_seed_is_the_same_run_bit_for_bit(run, same, dropout):
    method = trimtab.LoRA(rank=2, dropout=dropout)
    first, _, one = run(method=method, epochs=2)
    torch.rand(7)  # the caller's random state must not matter
    second, _, two = run(method=method, epochs=2)
    assert same(first, second)
    assert losses(one) == losses(two)


def test_another_seed_is_another_run(run):
    one, two = run(seed=1)[2], run(seed=2)[2]
    assert losses(one) != losses(two)


def test_dropout_is_on_in_training_and_off_in_evaluation(run):
    wet, dry = (run(method=trimtab.LoRA(rank=2, dropout=d), epochs=2)[2] for d in (0.5, 0.0))
    assert losses(wet)[0] == losses(dry)[0]  # B is zero, so there is nothing to drop
    assert losses(wet)[-1] != losses(dry)[-1]


def test_evaluation_does_not_change_training(run, same):
    method = trimtab.LoRA(rank=2, dropout=0.2)
    without, _, _ = run(method=method, epochs=2)
    looked, result, reports = run(method=method, epochs=2, eval_every=1, eval_examples=make_examples(4, seed=9))
    assert same(without, looked)
    assert all(report.eval_loss is not None for report in reports)
    assert result.eval_loss == reports[-1].eval_loss


def test_evaluation_comes_at_its_interval_and_at_the_end(run):
    _, _, reports = run(epochs=2, eval_every=3, eval_examples=make_examples(4, seed=9))
    assert [report.step for report in reports if report.eval_loss is not None] == [3, 6, 8]


def test_the_evaluation_loss_before_training_is_the_base_models(run, tmp_path):
    held_out = make_examples(3, seed=8)
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))
    settings = Settings(packing="pad")
    batches = eval_batches(held_out, settings, packing_for(adapter, "pad", held_out, causal_loss))
    _, result, reports = run(tmp_path, eval_examples=held_out, packing="pad")
    assert result.eval_loss_before == mean_loss(adapter.model.eval(), batches, causal_loss)
    assert result.eval_loss < result.eval_loss_before
    assert [report.eval_loss for report in reports[:-1]] == [None] * (len(reports) - 1)
    assert run()[1].eval_loss_before is None


def test_the_best_weights_are_kept_when_asked_for(run, same, tmp_path):
    evaluation = make_examples(4, seed=9)
    options = {"eval_examples": evaluation, "epochs": 8, "lr": 0.05, "eval_every": 1}
    _, _, reports = run(tmp_path / "last", **options)
    best = min(reports, key=lambda report: report.eval_loss)
    assert best.step < reports[-1].step
    state, result, _ = run(tmp_path / "best", keep_best=True, **options)
    early, _, _ = run(**{**options, "max_steps": best.step})
    assert same(state, early)
    assert result.eval_loss == best.eval_loss


def test_weights_of_a_method_that_is_still_being_set_up_are_not_the_best(run, tmp_path):
    options = {"eval_examples": make_examples(4, seed=9), "epochs": 3, "lr": 1.0, "eval_every": 1}  # worse and worse
    method = trimtab.Dash(rank=2, alpha=4, directions=2, warm_up_steps=6)
    _, _, reports = run(tmp_path / "last", method=method, **options)
    assert min(reports, key=lambda report: report.eval_loss).step < 6
    state, result, _ = run(tmp_path / "best", method=method, keep_best=True, **options)
    assert result.eval_loss == min(report.eval_loss for report in reports[5:])
    assert all((tensor >= 0).all() for key, tensor in state.items() if key.endswith("picked"))


def test_training_learns(run):
    _, _, reports = run(epochs=12)
    assert losses(reports)[-1] < 0.8 * losses(reports)[0]


def test_every_entry_is_free_under_the_full_method(run):
    state, _, reports = run(method=trimtab.Full(), epochs=4)
    assert losses(reports)[-1] < losses(reports)[0]
    assert all((change != 0).all() for change in state.values())


def test_a_method_without_a_rate_of_its_own_takes_its_default(run):
    assert run(lr=None)[2][0].lr == 2e-4
    assert run(lr=None, method=trimtab.Full())[2][0].lr == 2e-5


def test_the_base_and_its_buffers_are_untouched(llama, examples):
    before = {key: tensor.clone() for key, tensor in llama.state_dict().items()}
    buffers = [buffer.clone() for buffer in llama.buffers()]
    adapter = trimtab.attach(llama, trimtab.LoRA(rank=2))
    trimtab.fit(adapter, examples, Settings(lr=0.1, epochs=3))
    assert all(parameter.grad is None for key, parameter in llama.named_parameters() if "deltas" not in key)
    adapter.remove()
    after = llama.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(a, b) for a, b in zip(buffers, llama.buffers(), strict=True))


def test_the_callers_mode_and_random_state_come_back(llama, examples):
    adapter = trimtab.attach(llama, trimtab.LoRA(rank=2, dropout=0.5))
    llama.eval()
    llama.model.layers[1].train()
    modes = [module.training for module in llama.modules()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    trimtab.fit(adapter, examples, Settings(max_steps=2, gradient_checkpointing=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in llama.modules()] == modes
    assert not any(getattr(module, "gradient_checkpointing", False) for module in llama.modules())
    adapter.remove()
    for parameter in llama.parameters():
        parameter.requires_grad_(False)
    assert not llama(torch.tensor([[1, 2]])).logits.requires_grad  # no hook is left on its embeddings


def test_a_step_asks_for_numbers_once_whatever_its_batches(run, monkeypatch):
    asked, item, listed = [], torch.Tensor.item, torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: asked.append("item") or item(tensor))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append("list") or listed(tensor))
    counts = []
    for steps in (2, 4):
        for micro_batch in (1, 4):
            asked.clear()
            run(batch_size=4, micro_batch=micro_batch, max_steps=steps, epochs=9, packing="pad")
            counts.append(len(asked))
    assert counts[0] == counts[1]
    assert counts[2] == counts[3] == counts[0] + 2  # on a GPU each would wait for the model


def test_gradient_checkpointing_that_was_on_stays_on(llama, examples):
    enable = getattr(llama, "activation_checkpointing_enable", llama.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    trimtab.fit(
        trimtab.attach(llama, trimtab.LoRA(rank=2)), examples, Settings(max_steps=1, gradient_checkpointing=True)
    )
    assert any(getattr(module, "gradient_checkpointing", False) for module in llama.modules())


def test_old_gradients_do_not_leak_into_the_first_step(llama, examples, same):
    adapters = [trimtab.attach(make_llama(), trimtab.LoRA(rank=2)) for _ in range(2)]
    for parameter in adapters[1].parameters():
        parameter.grad = torch.ones_like(parameter)
    for adapter in adapters:
        trimtab.fit(adapter, examples, Settings(max_steps=2))
    assert same(*(adapter.state_dict() for adapter in adapters))


def test_deltas_are_told_of_each_step_once(llama, examples, monkeypatch):
    from trimtab.deltas.lora import LoRADelta

    seen = []
    monkeypatch.setattr(LoRADelta, "after_step", lambda self, step, weight: seen.append((step, weight.shape)))
    adapter = trimtab.attach(llama, trimtab.LoRA(rank=2), targets="q_proj")
    trimtab.fit(adapter, examples, Settings(batch_size=3, max_steps=3))
    assert seen == [(step, (16, 16)) for step in (1, 2, 3) for _ in range(2)]


def test_an_encoder_trains_with_a_loss_of_its_own():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    adapter = trimtab.attach(BertForMaskedLM(config), trimtab.LoRA(rank=2))

    def loss(model, batch):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        chosen = batch.labels != -100
        return torch.nn.functional.cross_entropy(logits[chosen], batch.labels[chosen], reduction="sum")

    reports, evaluation = [], make_examples(3, seed=4)
    result = trimtab.fit(
        adapter, make_examples(), Settings(lr=0.05, epochs=20), loss=loss, on_step=reports.append,
        eval_examples=evaluation,
    )  # fmt: skip
    assert losses(reports)[-1] < losses(reports)[0]
    from trimtab.data.batch import pad

    adapter.model.eval()
    batch = pad(evaluation, 0)
    with torch.no_grad():
        own = loss(adapter.model, batch) / batch.supervised_tokens
    assert result.eval_loss == pytest.approx(own.item(), rel=1e-5)


def test_an_encoder_without_one_is_refused():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    adapter = trimtab.attach(BertModel(config), trimtab.LoRA(rank=2))
    with pytest.raises(UsageError, match="BertModel is no causal language model"):
        trimtab.fit(adapter, make_examples())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"eval_every": 2}, "eval_every needs evaluation data"),
        ({"keep_best": True}, "keep_best needs evaluation data"),
        ({"save_every": 2}, "save_every needs the run folder"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(run, options, told):
    with pytest.raises(UsageError, match=told):
        run(**options)


def test_metrics_hold_every_step_and_read_as_json(run, tmp_path):
    _, result, reports = run(tmp_path, eval_examples=make_examples(2, seed=3))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == losses(reports)
    assert "eval_loss" not in rows[0]
    assert rows[-1]["eval_loss"] == result.eval_loss
    assert rows[-1]["epoch"] == 1.0


def test_the_saved_adapter_is_the_trained_one(run, same, tmp_path):
    state, result, _ = run(tmp_path)
    loaded = trimtab.load(make_llama(), tmp_path / "adapter")
    assert result.adapter == str(tmp_path / "adapter")
    assert same(loaded.state_dict(), state)


def test_bf16_trains_with_an_fp32_adapter(run):
    state, _, reports = run(llama=make_llama().to(torch.bfloat16), epochs=6)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert losses(reports)[-1] < losses(reports)[0]


def test_reports_are_frozen_facts(run):
    report = run()[2][0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.loss = 0.0
