"""The Trainer's checkpoints of an adapter: what is in them, and that a resumed run is the run, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tiny_training import make_llama
from trimtab.deltas.method import Method
from trimtab.errors import UsageError
from trimtab.formats.tensors import read_tensors

pytest.importorskip("accelerate", reason="the package accelerate, which the Trainer needs, is not installed")
from tiny_trainer import (
    DASH,
    LORA,
    METHODS,
    STEPS,
    WARM_UP,
    Whole,
    assert_equal,
    losses,
    make,
    trained,
    trainer_of,
    values,
)
from transformers import TrainerCallback

from trimtab.integrations.trainer import AdapterCallback


@pytest.mark.parametrize("step", [WARM_UP - 1, WARM_UP, WARM_UP + 1])
@pytest.mark.parametrize("name", ["dropout", "frozen-factors", "direction-lr"])
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_stopped(
    tmp_path: Path, whole: Whole, caplog: pytest.LogCaptureFixture, name: str, step: int
) -> None:
    wanted = whole(name)
    torch.rand(3)
    trainer, adapter = make(tmp_path, METHODS[name])
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=wanted.checkpoint(step))
    assert_equal(values(adapter), wanted.values)
    assert losses(trainer) == wanted.losses
    assert "missing keys" not in caplog.text


def test_a_shuffled_run_with_a_schedule_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Also where the Trainer makes the callback anew, from what it said of itself."""
    options = {
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 4,
        "restore_callback_states_from_checkpoint": True,
    }
    wanted = trained(tmp_path / "whole", METHODS["dropout"], **options)
    trainer, adapter = make(tmp_path / "cut", METHODS["dropout"], **options)
    trainer.train(resume_from_checkpoint=wanted.checkpoint(4))
    assert_equal(values(adapter), wanted.values)


def test_a_checkpoint_holds_what_is_trained_and_an_adapter_to_load(whole: Whole) -> None:
    checkpoint = Path(whole("dash").checkpoint(STEPS))
    stored = read_tensors(checkpoint / "model.safetensors")
    assert len(stored) == len(whole("dash").values)
    assert all(".deltas.default." in key for key in stored)
    assert_equal(values(trimtab.load(make_llama(), checkpoint / "adapter")), whole("dash").values)


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path: Path, whole: Whole) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # The highest loss stands for the best, so that it is not the last.
    trainer, adapter = make(
        tmp_path, LORA, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, **every
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best < STEPS
    loaded = trimtab.load(make_llama(), Path(whole("lora").checkpoint(best)) / "adapter")
    assert_equal(values(adapter), values(loaded))


@pytest.mark.parametrize(("name", "settled"), [("dash", WARM_UP), ("adalora", 4)])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_best_checkpoint_is_never_of_a_step_before_the_method_has_settled(
    tmp_path: Path, name: str, settled: int, resumed: bool
) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # The highest loss stands for the best: it is that of the first steps.
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer, _ = make(tmp_path, METHODS[name], **every, **worst)
    trainer.train()
    if resumed:
        trainer, _ = make(tmp_path, METHODS[name], **every, **worst)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{settled - 1}"))
    found = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert max(found, key=found.__getitem__) < settled
    best = max(range(settled, STEPS + 1), key=found.__getitem__)
    assert trainer.state.best_global_step == best < STEPS
    assert trainer.state.best_metric == found[best]
    stored, here = read_tensors(tmp_path / f"checkpoint-{best}" / "model.safetensors"), trainer.model.state_dict()
    assert [key for key, tensor in stored.items() if not torch.equal(here[key], tensor)] == []


@pytest.mark.parametrize("interrupted", [False, True])
def test_other_folders_get_the_whole_model(tmp_path: Path, interrupted: bool) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **given: Any) -> None:
            raise KeyboardInterrupt

    trainer, adapter = make(tmp_path / "run", LORA, *([Stop()] if interrupted else []), max_steps=1)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    trainer.save_model(str(tmp_path / "all"))
    trimtab.merge(adapter)
    trimtab.save_merged(trainer.model, tmp_path / "merged")
    for folder in ("all", "merged"):
        assert make_llama().state_dict().keys() <= read_tensors(tmp_path / folder / "model.safetensors").keys()


def test_the_model_is_itself_again_without_the_adapter(tmp_path: Path) -> None:
    model = make_llama()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer, adapter = make(tmp_path, DASH, model=model, save_strategy="steps", save_steps=3)
    trainer.train()
    adapter.remove()
    assert_equal(dict(model.state_dict()), before)
    assert "save_pretrained" not in vars(model)
    assert not model._load_state_dict_post_hooks


def test_copies_of_tied_weights_are_saved_once_and_resumed(tmp_path: Path) -> None:
    def run(out: Path, checkpoint: str | None = None) -> dict[str, Tensor]:
        model = make_llama(tie_word_embeddings=True)
        adapter = trimtab.attach(model, LORA, extra_modules=["lm_head", "embed_tokens"])
        trainer = trainer_of(model, out, AdapterCallback, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=checkpoint)
        return values(adapter)

    wanted = run(tmp_path / "whole")
    assert_equal(run(tmp_path / "cut", str(tmp_path / "whole" / "checkpoint-3")), wanted)


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=61, **sizes),
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **sizes),
        image_token_index=61,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


class Plain(nn.Module):
    """A model without save_pretrained."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_llama()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        return {"loss": self.inner(input_ids, attention_mask=attention_mask, labels=labels).loss}


@pytest.mark.parametrize("model", [llava, Plain], ids=["names-change-in-files", "not-of-transformers"])
def test_other_models_resume_too(tmp_path: Path, model: Callable[[], Any]) -> None:
    """transformers saves Llava's language model under other names, which its Trainer does not turn back."""
    targets = ["re:.*layers.*q_proj"]
    wanted = trained(tmp_path / "whole", DASH, model=model(), targets=targets, save_strategy="steps", save_steps=3)
    trainer, adapter = make(tmp_path / "cut", DASH, model=model(), targets=targets)
    trainer.train(resume_from_checkpoint=wanted.checkpoint(3))
    assert_equal(values(adapter), wanted.values)


@pytest.mark.parametrize(
    ("method", "seed", "name", "told"),
    [
        (trimtab.LoRA(rank=2, alpha=8), 0, "default", "alpha was 4, and is 8 now"),
        (LORA, 1, "default", r"the base is another one: 'model\.layers\.\S+' has other weights"),
        (LORA, 0, "other", "did not restore adapter 'other'"),
    ],
    ids=["method", "base", "name"],
)
def test_another_run_is_not_resumed(
    tmp_path: Path, whole: Whole, method: Method, seed: int, name: str, told: str
) -> None:
    model = make_llama(seed)
    adapter = trimtab.attach(model, method, seed=5, name=name)
    trainer = trainer_of(model, tmp_path, AdapterCallback(adapter))
    with pytest.raises(UsageError, match=told):
        trainer.train(resume_from_checkpoint=whole("lora").checkpoint(2))


def test_a_checkpoint_of_a_run_without_the_callback_is_not_resumed(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, LORA, save_strategy="steps", save_steps=2)
    trainer.remove_callback(AdapterCallback)
    trainer.train()
    trainer, _ = make(tmp_path, LORA)
    with pytest.raises(UsageError, match="written without an AdapterCallback"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
