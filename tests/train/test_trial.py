"""A run is tried against plain transformers before its first step, and does what they do."""

from __future__ import annotations

import pytest
import torch

import trimtab
from tiny_training import make_examples, make_llama
from trimtab.data.batch import pad
from trimtab.data.encode import Example
from trimtab.errors import UsageError
from trimtab.models import fused
from trimtab.models.readout import readout_of
from trimtab.tasks.likelihood import log_likelihoods
from trimtab.train import trial
from trimtab.train.loss import causal_loss
from trimtab.train.packing import packing_for
from trimtab.train.settings import Settings
from trimtab.train.trial import agrees, apart


def adapted(dtype=torch.float32):
    adapter = trimtab.attach(make_llama().to(dtype), trimtab.LoRA(rank=2, alpha=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.fixture
def wrong(monkeypatch):
    """wrong(by): norms as a run computes them come out larger by this share, which their own trial did not see."""

    def make(by: float) -> None:
        own = fused.rms_norm
        monkeypatch.setattr(fused, "_computes", lambda module, form, like: form is not fused.GatedLayer)
        monkeypatch.setattr(fused, "rms_norm", lambda *given: own(*given) * (1 + by))

    return make


@pytest.mark.parametrize("name", ["pad", "pack", "tree"])
def test_a_run_that_computes_what_transformers_do_differs_by_rounding(name: str, examples, monkeypatch) -> None:
    adapter, found = adapted(), []
    monkeypatch.setattr(trial, "apart", lambda ours, wanted: found.append(apart(ours, wanted)) or found[-1])
    assert agrees(adapter.model, adapter.parameters(), examples, packing_for(adapter, name, examples))
    loss, gradient = found
    assert 0 <= loss < 1e-6
    assert 0 < gradient < 1e-5
    assert all(parameter.grad is None for parameter in adapter.model.parameters())


def test_a_model_without_numbers_and_data_without_targets_are_told_of_in_training(examples, caplog) -> None:
    adapter = adapted()
    assert agrees(adapter.model, adapter.parameters(), [], packing_for(adapter, "auto", examples))
    assert agrees(
        adapter.model, adapter.parameters(), [Example([3], [True], 1, 0, False)], packing_for(adapter, "auto", examples)
    )
    with torch.no_grad():
        adapter.model.lm_head.weight[0, 0] = torch.nan
    assert agrees(adapter.model, adapter.parameters(), examples, packing_for(adapter, "pad", examples))
    assert "plainly" not in caplog.text


@pytest.mark.parametrize(("dtype", "by"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_what_no_smaller_trial_saw_is_seen(dtype: torch.dtype, by: float, examples, wrong, caplog) -> None:
    adapter = adapted(dtype)
    packing = packing_for(adapter, "auto", examples)
    assert agrees(adapter.model, adapter.parameters(), examples, packing)
    wrong(by)
    assert not agrees(adapter.model, adapter.parameters(), examples, packing)
    assert "LlamaForCausalLM is computed plainly, without what makes it faster" in caplog.text


def test_what_gives_no_number_is_left_out(examples, wrong, caplog) -> None:
    adapter = adapted()
    packing = packing_for(adapter, "auto", examples)
    wrong(torch.nan)
    assert not agrees(adapter.model, adapter.parameters(), examples, packing)
    assert "the loss is nan% apart" in caplog.text


def test_a_run_falls_back_on_plain_transformers(run, wrong) -> None:
    wanted, *_ = run(packing="pad")
    wrong(0.1)
    llama = make_llama()
    got, *_ = run(llama=llama)
    assert readout_of(llama) is not None  # afterwards it is asked anew
    for key, tensor in wanted.items():
        assert (got[key] - tensor).norm() < 1e-2 * tensor.norm()


def test_scores_fall_back_on_plain_transformers(examples, wrong) -> None:
    llama, found = make_llama(), []
    wanted = [-causal_loss(llama, pad([example], 0)).item() for example in examples]
    wrong(0.1)
    log_likelihoods(llama, [[examples]], lambda number, sums: found.extend(sums))
    assert found == [pytest.approx(wanted, rel=1e-5)]


@pytest.mark.parametrize("name", ["tree", "pack"])
def test_a_packing_asked_for_by_name_is_refused_then(name: str, examples, wrong) -> None:
    adapter = adapted()
    wrong(0.1)
    with pytest.raises(UsageError, match=f"packing '{name}' does not compute what plain transformers does"):
        trimtab.fit(adapter, examples, Settings(packing=name))


def test_what_fails_where_plain_transformers_do_not_is_left_out(examples, monkeypatch, caplog) -> None:
    def fails(*_given):
        raise RuntimeError("not this model")

    adapter = adapted()
    monkeypatch.setattr(fused, "_rotates_by_halves", lambda own, dtype: True)
    monkeypatch.setattr(fused, "rotate", fails)
    assert trimtab.fit(adapter, examples, Settings(max_steps=2)).steps == 2
    assert "they fail (RuntimeError: not this model)" in caplog.text


def test_memory_that_runs_out_in_the_trial_says_what_to_lower(examples, monkeypatch) -> None:
    def fails(*_given):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(fused, "rms_norm", fails)
    monkeypatch.setattr(fused, "_computes", lambda module, form, like: form is not fused.GatedLayer)
    with pytest.raises(trimtab.errors.OutOfMemory, match="lower micro_batch"):
        trimtab.fit(adapted(), make_examples(), Settings())
