"""What goes wrong in training is told, with what to do, and costs nothing that was there before."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess

import pytest
import torch

import trimtab
from tiny_training import VOCABULARY, make_examples, make_llama
from trimtab.data.encode import Example
from trimtab.errors import OutOfMemory, TrainingError, TrimtabError, UsageError
from trimtab.files import StorageError
from trimtab.train.checkpoint import checkpoints, save_checkpoint
from trimtab.train.loss import causal_loss
from trimtab.train.settings import Settings


def finite_loss(model, examples):
    from trimtab.data.batch import pad

    model.eval()
    with torch.no_grad():
        return causal_loss(model, pad(examples, 0)).isfinite().item()


def test_a_nan_in_the_model_stops_the_run_and_names_step_and_rows(examples, tmp_path):
    model = make_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2))
    start = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step 1 has loss nan \(look at its rows: [\d, ]+\)") as caught:
        trimtab.fit(adapter, examples, Settings(), out=tmp_path)
    assert caught.value.exit_code == 1
    for key, tensor in trimtab.load(make_llama(), tmp_path / "adapter").state_dict().items():
        assert torch.equal(tensor, start[key])


def test_weights_that_blow_up_are_not_what_is_kept(run, examples, tmp_path):
    with pytest.raises(TrainingError, match=r"the last good adapter, of step \d+, is in") as caught:
        run(tmp_path, lr=1e30, epochs=4)
    step = int(str(caught.value).split("step ")[1].split()[0])
    model = make_llama()
    kept = trimtab.load(model, tmp_path / "adapter")
    assert all(tensor.isfinite().all() for tensor in kept.state_dict().values())
    assert finite_loss(model, examples)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step - 1


def test_one_bad_batch_keeps_what_was_learned_before_it(run, examples, same, tmp_path):
    before, _, _ = run(max_steps=1, loss=lambda model, batch: causal_loss(model, batch))  # a loss of one's own
    calls = []

    def poisoned(model, batch):
        calls.append(batch.examples)
        return causal_loss(model, batch) * (float("inf") if len(calls) == 3 else 1.0)

    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2, alpha=4), seed=5)
    settings = Settings(batch_size=3, lr=1e-2, seed=5)
    with pytest.raises(TrainingError) as caught:
        trimtab.fit(adapter, examples, settings, out=tmp_path, loss=poisoned)
    assert f"step 3 has loss inf (look at its rows: {', '.join(map(str, calls[2]))})" in str(caught.value)
    assert "of step 1" in str(caught.value)
    assert same(trimtab.load(make_llama(), tmp_path / "adapter").state_dict(), before)
    assert same(adapter.state_dict(), before)  # in memory as well


def test_a_gradient_that_is_not_finite_stops_the_run_too(examples):
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))

    def loss(model, batch):
        value = causal_loss(model, batch)
        value.register_hook(lambda gradient: gradient * float("nan"))
        return value

    with pytest.raises(TrainingError, match="step 1 has a finite loss but gradient norm nan"):
        trimtab.fit(adapter, examples, Settings(), loss=loss)


def test_an_evaluation_that_is_not_finite_stops_the_run(examples, tmp_path):
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))

    steps = []

    def loss(model, batch):
        return causal_loss(model, batch) * (float("nan") if steps and not model.training else 1.0)

    with pytest.raises(TrainingError, match="the evaluation after step 2 has loss nan"):
        trimtab.fit(
            adapter, examples, Settings(), loss=loss, eval_examples=make_examples(2), out=tmp_path / "a",
            on_step=steps.append,
        )  # fmt: skip
    assert (tmp_path / "a" / "adapter").is_dir()
    with pytest.raises(TrainingError, match="the evaluation before training has loss nan"):
        trimtab.fit(adapter, examples, Settings(), loss=loss, eval_examples=make_examples(2), out=tmp_path / "b")


def test_a_run_that_ends_far_above_its_start_says_so(run, examples, caplog):
    def climbing(model, batch):
        value = causal_loss(model, batch)
        return 2 * value.detach() - value  # the same figure, and the opposite gradient

    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2, alpha=4), seed=1)
    trimtab.fit(adapter, examples, Settings(batch_size=3, epochs=16, lr=0.1), loss=climbing)
    assert "the run diverged: its training loss was" in caplog.text
    caplog.clear()
    run(epochs=4)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_steps_without_any_gradient_are_told_at_once_and_counted(examples, caplog):
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))

    def loss(model, batch):
        return causal_loss(model, batch) * 0.0

    trimtab.fit(adapter, examples, Settings(batch_size=4), loss=loss)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        "step 1 has loss 0.000 and a gradient of exactly 0: nothing is learned",
        "the gradient was exactly 0 in 3 of 3 steps, in which nothing was learned: lower the learning rate",
    ]


def test_a_last_step_that_leaves_no_numbers_does_not_pass(examples, tmp_path, monkeypatch):
    from trimtab.deltas.lora import LoRADelta

    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))
    monkeypatch.setattr(LoRADelta, "after_step", lambda self, step, weight: self.B.data.fill_(float("inf")))
    with pytest.raises(TrainingError, match=r"step 1 leaves weights that are not finite.*of step 0"):
        trimtab.fit(adapter, examples, Settings(max_steps=1), out=tmp_path)
    assert finite_loss(adapter.model, examples)


def test_a_resumed_run_that_fails_at_once_keeps_the_adapter_that_was_saved(run, stopped, examples, tmp_path):
    with pytest.raises(stopped):
        run(tmp_path, stop=3, save_every=2)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "aside")
    run(tmp_path, save_every=2, resume=True)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "aside").rename(tmp_path / "checkpoints")
    saved = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    model = make_llama()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 3 has loss nan"):
        run(tmp_path, save_every=2, resume=True, llama=model)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == saved


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["os.fsync", "trimtab.train.checkpoint.write_tensors", "pathlib.Path.mkdir"])
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(run, same, tmp_path, monkeypatch, place):
    whole, _, _ = run(epochs=2)
    saves = []

    def full_at_the_second(*args, **kwargs):
        saves.append(args)
        if len(saves) == 2:
            monkeypatch.setattr(place, no_space)
        return save_checkpoint(*args, **kwargs)

    monkeypatch.setattr("trimtab.train.loop.save_checkpoint", full_at_the_second)
    with pytest.raises(StorageError, match=r"no space left on the disk of .*step-000004") as caught:
        run(tmp_path, epochs=2, save_every=2)
    assert caught.value.exit_code == 2
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    state, _, reports = run(tmp_path, epochs=2, save_every=2, resume=True)
    assert reports[0].step == 3
    assert same(state, whole)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tiny file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_fills_up_says_so(run, tiny_disk):
    with pytest.raises(TrimtabError, match="no space left on the disk") as caught:
        run(tiny_disk / "run", epochs=4, save_every=1, method=trimtab.LoRA(rank=8))
    assert caught.value.exit_code == 2


def test_a_full_disk_under_the_metrics_says_so(run, tmp_path, monkeypatch):
    from trimtab.train.metrics import MetricsFile

    class Full:
        def write(self, text):
            no_space()

        def close(self):
            no_space()

    original = MetricsFile.__init__

    def with_full_file(self, path, last_step):
        original(self, path, last_step)
        self._file.close()
        self._file = Full()

    monkeypatch.setattr(MetricsFile, "__init__", with_full_file)
    with pytest.raises(StorageError, match=r"no space left on the disk of .*metrics\.jsonl"):
        run(tmp_path)


def test_a_file_in_the_way_of_the_run_is_told(run, tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(StorageError, match=r"cannot write .*metrics") as caught:
        run(tmp_path / "runs" / "one")
    assert caught.value.exit_code == 2


def test_tokens_and_lengths_the_model_has_nothing_for_are_refused(examples, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, RobertaConfig, RobertaForCausalLM

    small = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
    wide = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = [
        GPT2LMHeadModel(GPT2Config(**small, n_embd=16, n_layer=1, n_head=2, n_positions=12)),
        OPTForCausalLM(OPTConfig(**small, **wide, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=12)),
        RobertaForCausalLM(RobertaConfig(**small, **wide, is_decoder=True, max_position_embeddings=14)),  # 2 unused
    ]
    other = Example([3, VOCABULARY], [True, True], 77, 0, False)
    for model in models:
        adapter = trimtab.attach(model, trimtab.LoRA(rank=2))
        fitting = Example(list(range(2, 14)), [True] * 12, 1, 0, False)
        trimtab.fit(adapter, [fitting], Settings(packing="pad"))
        with pytest.raises(UsageError, match=r"has 13 tokens, but .* has positions for 12: lower max_length"):
            trimtab.fit(adapter, [fitting, Example(list(range(13)), [True] * 13, 1, 0, False)])
        with pytest.raises(UsageError, match=f"row 77 has token {VOCABULARY}, but .* has embeddings for 0 to 60"):
            trimtab.fit(adapter, [fitting], eval_examples=[other])
        with pytest.raises(UsageError, match="row 78 has token -100"):
            trimtab.fit(adapter, [fitting, Example([3, -100, 4], [True] * 3, 78, 0, False)])
    turning = make_llama(max_position_embeddings=12)
    trimtab.fit(trimtab.attach(turning, trimtab.LoRA(rank=2)), examples)
    assert "more than the 12 that LlamaForCausalLM was made for" in caplog.text


def test_positions_of_images_do_not_limit_texts(examples):
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 16, **small}
    text = LlamaConfig(vocab_size=VOCABULARY, **small)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=VOCABULARY - 1)
    adapter = trimtab.attach(
        LlavaForConditionalGeneration(config), trimtab.LoRA(rank=2), targets=["re:.*language_model.*q_proj"]
    )
    texts = [dataclasses.replace(e, input_ids=[i % 50 for i in e.input_ids]) for e in examples]
    assert max(len(e.input_ids) for e in texts) > 5  # positions of an image
    assert trimtab.fit(adapter, texts, Settings(max_steps=1)).steps == 1


@pytest.mark.parametrize("packing", ["auto", "tree", "pad"])
def test_an_example_without_tokens_is_left_out_like_others_without_targets(examples, packing):
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))
    with_nothing = [*examples, Example([], [], 99, 0, False), Example([5] * 200, [False] * 200, 98, 0, False)]
    assert trimtab.fit(adapter, with_nothing, Settings(packing=packing, batch_size=5)).steps == 2
    with pytest.raises(UsageError, match="none of the 2 examples has a supervised token"):
        trimtab.fit(adapter, with_nothing[-2:], Settings(packing=packing))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_says_what_to_lower(examples, error):
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))

    def loss(model, batch):
        raise error

    with pytest.raises(OutOfMemory, match=r"lower micro_batch \(now 4\), max_length or the rank") as caught:
        trimtab.fit(adapter, examples, Settings(batch_size=8, micro_batch=4), loss=loss)
    assert caught.value.exit_code == 2


def test_the_cpu_allocators_own_message_counts_as_out_of_memory(examples):
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))

    def loss(model, batch):
        return torch.empty(2**60) + causal_loss(model, batch)

    with pytest.raises(OutOfMemory, match="out of memory: lower max_length or the rank"):
        trimtab.fit(adapter, examples, Settings(batch_size=1), loss=loss)


def test_another_runtime_error_stays_what_it_is(examples):
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))

    def loss(model, batch):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as caught:
        trimtab.fit(adapter, examples, Settings(), loss=loss)
    assert not isinstance(caught.value, TrimtabError)


def test_a_model_without_gradient_checkpointing_is_told(examples):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_llama()

        def forward(self, **inputs):
            return self.inner(**inputs)

    adapter = trimtab.attach(Plain(), trimtab.LoRA(rank=2), targets="q_proj")
    with pytest.raises(UsageError, match="Plain has no gradient checkpointing"):
        trimtab.fit(adapter, examples, Settings(gradient_checkpointing=True))
    trimtab.fit(adapter, examples, Settings(max_steps=1))


def test_what_was_logged_before_an_error_is_closed_and_whole(run, stopped, tmp_path):
    closed = []

    class Log:
        def log(self, row):
            pass

        def close(self):
            closed.append(True)

    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))

    def fail(report):
        if report.step == 2:
            raise stopped

    with pytest.raises(stopped):
        trimtab.fit(adapter, make_examples(), Settings(batch_size=3), out=tmp_path, on_step=fail, loggers=[Log()])
    assert closed == [True]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert checkpoints(tmp_path / "checkpoints") == []


def test_training_an_adapter_that_is_not_enabled_is_refused(examples):
    model = make_llama()
    first = trimtab.attach(model, trimtab.LoRA(rank=2), name="first")
    trimtab.attach(model, trimtab.LoRA(rank=2), name="second")
    with pytest.raises(UsageError, match="'first' is not enabled"):
        trimtab.fit(first, examples, Settings(max_steps=1))


def test_training_while_an_adapter_is_merged_is_refused(examples):
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))
    with torch.no_grad():
        adapter.parameters()[1].add_(1.0)
    trimtab.merge(adapter)
    with pytest.raises(UsageError, match="is merged into the weights"):
        trimtab.fit(adapter, examples, Settings(max_steps=1))


def test_float16_parameters_are_refused_for_training(examples):
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2), dtype=torch.float16)
    with pytest.raises(UsageError, match="float16 parameters overflow"):
        trimtab.fit(adapter, examples, Settings(max_steps=1))
