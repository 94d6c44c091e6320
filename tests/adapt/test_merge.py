"""Merging and its audit, and the folder a merged model is saved in."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from toys import assert_same, batch, built, logits, numbers, reader, seer, snapshot, stir, tokens
from trimtab import LoRA, UsageError
from trimtab.adapt.merge import MergeError

SMALL = LoRA(rank=2)
IDS = tokens(4, 6)
SAME = {"rtol": 1e-5, "atol": 2e-6}


def one_layer(dtype: torch.dtype, size: float = 0.3) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12)).to(dtype)
    adapter = trimtab.attach(model, SMALL)
    return model, stir(adapter, size=size)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=str)
def test_the_audit_equals_a_direct_computation(base: torch.dtype, dtype: torch.dtype | None) -> None:
    model, adapter = one_layer(base, size=0.02)
    used = dtype or base
    weight, change = model[0].weight.detach().clone(), adapter.deltas["0"].weight_change(None).detach()
    audit = trimtab.merge(adapter, dtype=dtype, probes=[numbers(3, 16).to(base)] if used == base else [])
    (layer,) = audit.layers
    wanted = weight.double() + change.double()
    assert torch.equal(model[0].weight, (weight.float() + change).to(used))
    assert model[0].bias.dtype == used
    rounded = weight.to(used).double()
    realised = model[0].weight.double() - rounded
    assert layer.name == "0"
    assert layer.relative_change == pytest.approx((change.norm() / rounded.norm()).item(), rel=1e-5)
    assert layer.unchanged_share == pytest.approx((realised == 0).double().mean().item())
    assert layer.realised_share == pytest.approx((realised.norm() / change.norm()).item(), rel=1e-4)
    assert layer.error_share == pytest.approx(((realised - change).norm() / change.norm()).item(), rel=1e-2, abs=1e-5)
    assert audit.dtype == str(used).removeprefix("torch.")
    assert (model[0].weight.double() - wanted).abs().max() <= wanted.abs().max() * torch.finfo(used).eps
    assert (layer.unchanged_share > 0) == (used == torch.bfloat16)


def test_the_audit_measures_outputs_on_probes() -> None:
    model = built("llama")
    adapter = stir(trimtab.attach(model, SMALL, seed=2), size=0.05)
    model.to(torch.bfloat16)
    probe = {"input_ids": tokens(2, 9, vocabulary=48)}
    with torch.no_grad():
        before = model(**probe).logits.float()
    audit = trimtab.merge(adapter, probes=[probe])
    with torch.no_grad():
        after = model(**probe).logits.float()
    assert audit.max_logit_difference == (after - before).abs().max().item() > 0
    assert audit.greedy_agreement == (after.argmax(-1) == before.argmax(-1)).float().mean().item()
    assert audit.probe_positions == 18
    assert audit.probe_kind == "given inputs"


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_transformers_models_are_probed_without_being_asked(name: str) -> None:
    audit = trimtab.merge(stir(trimtab.attach(built(name), SMALL)))
    assert audit.max_logit_difference is not None
    assert 0 < audit.max_logit_difference < 1e-4
    assert (audit.greedy_agreement is not None) == (name in ("llama", "t5"))
    assert "seeded" in audit.probe_kind


def test_a_plain_model_without_probes_says_that_none_were_run() -> None:
    audit = trimtab.merge(stir(trimtab.attach(reader(), SMALL)))
    assert audit.max_logit_difference is None
    assert "pass probes" in audit.probe_kind
    assert "output difference" not in audit.summary()


def test_the_audit_can_be_read_and_written() -> None:
    audit = trimtab.merge(stir(trimtab.attach(reader(), SMALL)), probes=[IDS])
    written = json.loads(json.dumps(audit.to_dict()))
    assert written["layers"][0]["name"] == "blocks.0.qkv"
    assert written["max_logit_difference"] == audit.max_logit_difference
    assert "merged 5 weights into float32" in audit.summary()


def test_probing_leaves_every_mode_as_it_was() -> None:
    model = seer().train()
    model.head.eval()
    adapter = stir(trimtab.attach(model, LoRA(rank=2, dropout=0.5), targets=["stem", "conv"]))
    before = snapshot(model)
    trimtab.merge(adapter, probes=[numbers(2, 3, 8, 8)])
    trimtab.unmerge(adapter)
    assert_same(before, snapshot(model))
    adapter.remove()
    assert model.norm.training
    assert not model.head[1].training


@pytest.mark.parametrize("verb", ["unmerge", "merge another"])
def test_a_model_that_was_cast_while_merged_is_left_as_it_is(verb: str) -> None:
    model = reader()
    other = trimtab.attach(model, SMALL, name="other")
    adapter = stir(trimtab.attach(model, SMALL))
    own = [model.head.weight.clone(), model.head.weight]
    trimtab.merge(adapter, probes=[IDS])
    placed = model.head.weight.detach().clone()
    model.to(torch.bfloat16)
    cast = snapshot(model)
    with pytest.raises(
        UsageError, match=r"weight was torch.float32 .* is torch.bfloat16 now.*model.to\(torch.float32\)"
    ):
        trimtab.unmerge(adapter) if verb == "unmerge" else trimtab.merge(other, probes=[IDS])
    assert_same(cast, snapshot(model))
    model.to(torch.float32)
    assert not torch.equal(model.head.weight, placed)  # bf16 kept less of it
    trimtab.unmerge(adapter)
    assert model.head.weight is own[1]
    assert torch.equal(model.head.weight, own[0])


def test_a_mode_set_while_merged_reaches_the_deltas() -> None:
    model = reader()
    adapter = stir(trimtab.attach(model, LoRA(rank=2, dropout=0.5)))
    trimtab.merge(adapter)
    model.train()
    trimtab.unmerge(adapter)
    assert all(delta.training for delta in adapter.deltas.values())


def test_merging_an_untrained_adapter_is_an_error_and_changes_nothing() -> None:
    model = reader()
    adapter = trimtab.attach(model, SMALL)
    before = snapshot(model)
    with pytest.raises(MergeError, match="the adapter's change is zero"):
        trimtab.merge(adapter)
    assert_same(before, snapshot(model))
    assert adapter.enabled


def test_a_change_that_rounding_swallows_is_an_error_and_float32_keeps_it() -> None:
    model, adapter = one_layer(torch.bfloat16, size=1e-7)
    with torch.no_grad():
        model[0].weight.copy_(1 + torch.rand(12, 16))
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"too small for this dtype. Merge with dtype=torch.float32"):
        trimtab.merge(adapter)
    assert_same(before, snapshot(model))
    audit = trimtab.merge(adapter, dtype=torch.float32, probes=[])
    assert audit.layers[0].realised_share > 0
    trimtab.unmerge(adapter)
    assert_same(before, snapshot(model))


def test_a_change_that_rounding_swallows_is_an_error_when_the_base_is_narrowed_too() -> None:
    _, adapter = one_layer(torch.float32, size=1e-7)
    with pytest.raises(MergeError, match="too small"):
        trimtab.merge(adapter, dtype=torch.bfloat16, probes=[])


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_a_trained_bias_alone_is_worth_merging(dtype: torch.dtype | None) -> None:
    model = reader().to(torch.bfloat16)
    adapter = trimtab.attach(model, SMALL, bias="all")
    with pytest.raises(MergeError):
        trimtab.merge(adapter, dtype=dtype)
    with torch.no_grad():
        adapter.copies["head"].bias += 1
    trimtab.merge(adapter, dtype=dtype)
    assert torch.equal(model.head.bias, adapter.copies["head"].bias.to(dtype or torch.bfloat16))


def test_a_second_adapter_without_a_change_is_an_error_and_the_first_stays_merged() -> None:
    model = reader()
    one = stir(trimtab.attach(model, SMALL, name="one"))
    two = trimtab.attach(model, SMALL, name="two")
    one.enable()
    trimtab.merge(one)
    wanted = model(IDS)
    with pytest.raises(MergeError, match="merging 'two'"):
        trimtab.merge(two)
    assert torch.equal(model(IDS), wanted)
    trimtab.unmerge(one)


def test_a_probe_that_fails_leaves_everything_as_it_was() -> None:
    model = reader()
    adapter = stir(trimtab.attach(model, SMALL))
    trimtab.switch(model, None)
    before = snapshot(model)
    with pytest.raises(TypeError):
        trimtab.merge(adapter, probes=["not a tensor"])
    assert_same(before, snapshot(model))
    assert not adapter.enabled


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_several_adapters_merge_into_one_sum(first: int, dtype: torch.dtype | None) -> None:
    model = reader().to(torch.bfloat16)
    adapters = [
        stir(trimtab.attach(model, SMALL, name=name, targets=targets), seed=seed, size=0.05)
        for name, targets, seed in (("a", "all-linear", 1), ("b", "qkv", 2))
    ]
    trimtab.switch(model, None)
    before = snapshot(model)
    weight = model.blocks[0].qkv.weight
    changes = [adapter.deltas["blocks.0.qkv"].weight_change(weight) for adapter in adapters]
    trimtab.merge(adapters[first], dtype=dtype)
    trimtab.merge(adapters[1 - first])
    assert torch.equal(
        model.blocks[0].qkv.weight, (weight.float() + changes[first] + changes[1 - first]).to(dtype or weight.dtype)
    ), "rounded once"
    trimtab.unmerge(adapters[first])
    assert torch.equal(model.blocks[0].qkv.weight, (weight.float() + changes[1 - first]).to(dtype or weight.dtype))
    assert model.norm.weight.dtype == (dtype or torch.bfloat16)
    trimtab.unmerge(adapters[1 - first])
    trimtab.switch(model, None)
    assert_same(before, snapshot(model))


def test_merged_and_enabled_adapters_add_up() -> None:
    model = reader()
    one, two = (stir(trimtab.attach(model, SMALL, name=name), seed=i) for i, name in enumerate(("one", "two")))
    one.enable()
    wanted = model(IDS)
    trimtab.merge(one)
    torch.testing.assert_close(model(IDS), wanted, **SAME)
    assert two.enabled
    two.disable()
    trimtab.merge(two)
    torch.testing.assert_close(model(IDS), wanted, **SAME)
    assert type(model.head) is nn.Linear


def test_a_copy_of_one_adapter_and_a_delta_of_another_merge_as_they_compute() -> None:
    model = reader()
    one = stir(trimtab.attach(model, SMALL, targets="qkv", extra_modules=["head"], name="one"))
    two = stir(trimtab.attach(model, SMALL, targets="head", name="two"), seed=50)
    one.enable()
    wanted = model(IDS)
    trimtab.merge(two)
    trimtab.merge(one)
    torch.testing.assert_close(model(IDS), wanted, **SAME)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda m, a, b: trimtab.merge(a), "'a' is merged already"),
        (lambda m, a, b: trimtab.unmerge(b), "'b' is not merged"),
        (lambda m, a, b: a.remove(), "'a' is merged: unmerge it before removing"),
        (lambda m, a, b: a.disable(), "'a' is merged into the weights: unmerge it to switch it off"),
        (lambda m, a, b: trimtab.switch(m, "b"), "'a' is merged into the weights"),
        (lambda m, a, b: trimtab.switch(m, None), "'a' is merged into the weights"),
        (lambda m, a, b: trimtab.rows(m, ["a"] * 4).__enter__(), "unmerge it before using rows"),
        (lambda m, a, b: trimtab.attach(m, SMALL, name="c"), "unmerge it before adding another"),
    ],
)
def test_what_cannot_be_done_while_merged_is_refused(action, message: str) -> None:
    model = reader()
    b, a = (stir(trimtab.attach(model, SMALL, name=name), seed=i) for i, name in enumerate("ba"))
    trimtab.merge(a)
    before = snapshot(model)
    with pytest.raises(UsageError, match=message):
        action(model, a, b)
    assert_same(before, snapshot(model))
    assert a.enabled


def test_merging_a_model_instead_of_its_adapter_says_what_to_give() -> None:
    model = reader()
    trimtab.attach(model, SMALL)
    for verb in (trimtab.merge, trimtab.unmerge):
        with pytest.raises(UsageError, match=r"an adapter is needed here, not a Reader.*trimtab\.adapters\(model\)"):
            verb(model)


def test_merging_a_target_with_a_tied_weight_is_refused(caplog) -> None:
    model = built("llama-tied")
    adapter = stir(trimtab.attach(model, SMALL, targets=["embed_tokens", "q_proj"]))
    assert "embed_tokens shares its weight with lm_head" in caplog.text, "told before any training"
    assert "merging it will be refused" in caplog.text
    before = snapshot(model)
    with pytest.raises(
        UsageError, match=r"model.embed_tokens shares its weight with lm_head: merging would change both"
    ):
        trimtab.merge(adapter)
    assert_same(before, snapshot(model))


def test_tied_copies_stay_tied_when_merged(tmp_path) -> None:
    model = built("llama-tied")
    adapter = stir(trimtab.attach(model, SMALL, extra_modules=["lm_head"]), size=0.1)
    wanted = logits(model, "llama")
    for dtype in (None, torch.bfloat16):
        trimtab.merge(adapter, dtype=dtype)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        if dtype is None:
            torch.testing.assert_close(logits(model, "llama"), wanted, rtol=1e-4, atol=1e-5)
            merged = logits(model, "llama")
            trimtab.save_merged(model, tmp_path / "merged")
        trimtab.unmerge(adapter)
    loaded = plain(tmp_path / "merged")
    assert torch.equal(logits(loaded, "llama"), merged)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def plain(folder: Any, cls: str = "AutoModelForCausalLM") -> Any:
    import transformers

    return getattr(transformers, cls).from_pretrained(folder).eval()


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "The", "capital", "of", "France", "is", "def", "return", "Question", "Answer"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[UNK]")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("llama", "AutoModelForCausalLM"),
        ("gpt2", "AutoModelForCausalLM"),
        ("bert", "AutoModelForSequenceClassification"),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("vit", "AutoModelForImageClassification"),
    ],
)
def test_the_merged_folder_loads_in_plain_transformers(name: str, cls: str, tmp_path) -> None:
    model = built(name)
    adapter = stir(trimtab.attach(model, SMALL, bias="none" if name in ("llama", "t5") else "all"))
    other = stir(trimtab.attach(model, SMALL, name="beside"))
    trimtab.switch(model, "default")
    trimtab.merge(adapter)
    merged = logits(model, name)
    trimtab.save_merged(model, tmp_path / "merged", tokenizer=tokenizer())
    assert torch.equal(logits(plain(tmp_path / "merged", cls), name), merged)
    assert {p.name for p in tmp_path.iterdir()} == {"merged"}
    assert other.deltas


def test_the_merged_folder_carries_tokenizer_and_chat_template(tmp_path) -> None:
    from transformers import AutoTokenizer

    model, own = built("llama"), tokenizer()
    audit = trimtab.merge(stir(trimtab.attach(model, SMALL)), tokenizer=own)
    assert audit.probe_kind == "8 prompts"
    trimtab.save_merged(model, tmp_path / "merged", tokenizer=own)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert loaded.chat_template == own.chat_template
    assert loaded("The capital")["input_ids"] == own("The capital")["input_ids"]


def test_a_model_merged_into_float32_is_saved_in_float32(tmp_path) -> None:
    model = built("llama").to(torch.bfloat16)
    adapter = stir(trimtab.attach(model, SMALL), size=0.01)
    frequencies = model.model.rotary_emb.inv_freq
    trimtab.merge(adapter, dtype=torch.float32)
    assert {p.dtype for p in model.parameters() if p.dim() > 1} == {torch.float32}
    assert model.model.rotary_emb.inv_freq is frequencies
    merged = logits(model, "llama")
    trimtab.save_merged(model, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    loaded = plain(tmp_path / "merged")
    assert loaded.dtype == torch.float32
    # the frequencies of a model cast to bf16 stay rounded, those of the loaded one are computed anew
    torch.testing.assert_close(logits(loaded, "llama"), merged, rtol=0.02, atol=0.02)
    trimtab.unmerge(adapter)
    assert model.dtype == torch.bfloat16


def test_saving_an_unmerged_model_as_merged_is_refused(tmp_path) -> None:
    model = built("llama")
    adapter = stir(trimtab.attach(model, SMALL))
    with pytest.raises(UsageError, match="nothing is merged"):
        trimtab.save_merged(model, tmp_path / "merged")
    trimtab.merge(adapter)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is something else"):
        trimtab.save_merged(model, tmp_path / "taken")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


def test_a_plain_model_is_not_saved_as_a_transformers_folder(tmp_path) -> None:
    model = reader()
    trimtab.merge(stir(trimtab.attach(model, SMALL)))
    with pytest.raises(UsageError, match="a Reader has no save_pretrained"):
        trimtab.save_merged(model, tmp_path / "merged")


def test_training_batches_agree_before_and_after_a_merge() -> None:
    model = built("qwen3")
    adapter = stir(trimtab.attach(model, SMALL))
    with torch.no_grad():
        before = model(**batch("qwen3")).loss
        trimtab.merge(adapter)
        torch.testing.assert_close(model(**batch("qwen3")).loss, before, rtol=1e-5, atol=1e-5)
