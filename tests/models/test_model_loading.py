from __future__ import annotations

import json

import pytest
import torch

from trimtab.errors import FormatError, UsageError
from trimtab.models.embedded import EMBEDDED
from trimtab.models.load import load, outline


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_folder_loads_as_it_was_saved(llama_folder):
    from transformers import LlamaForCausalLM

    loaded = load(str(llama_folder))
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert loaded.tokenizer is None
    assert (loaded.name, loaded.path) == (str(llama_folder), llama_folder)
    saved = LlamaForCausalLM.from_pretrained(llama_folder).state_dict()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, saved[name]), name


@pytest.mark.parametrize("dtype", ["fp32", "float32", torch.float32])
def test_a_dtype_can_be_asked_for(llama_folder, dtype):
    assert load(str(llama_folder), dtype=dtype).model.dtype == torch.float32


def test_an_outline_has_the_shapes_of_the_model_and_no_values(llama_folder):
    wanted = {name: p.shape for name, p in load(str(llama_folder)).model.named_parameters()}
    (llama_folder / "model.safetensors").unlink()  # which it does not read
    bare = outline(str(llama_folder))
    assert {name: p.shape for name, p in bare.named_parameters()} == wanted
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    with pytest.raises(UsageError, match="cannot be loaded as seq2seq-lm"):
        outline(str(llama_folder), kind="seq2seq-lm")


def test_a_gguf_file_loads_with_its_tokenizer(tiny_gguf):
    loaded = load(str(tiny_gguf[0]))
    ids = loaded.tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert torch.isfinite(loaded.model(input_ids=ids).logits).all()
    assert loaded.model.dtype == torch.float32


def names_saved(model, folder):
    import trimtab

    trimtab.attach(model, trimtab.LoRA(rank=2)).save(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    own = json.loads((folder / "trimtab.json").read_text())
    return config["base_model_name_or_path"], own["provenance"]["base_model"]


def test_an_adapter_on_a_converted_file_does_not_name_the_cache(tiny_gguf, tmp_path):
    name = str(tiny_gguf[0])
    assert names_saved(load(name).model, tmp_path / "adapter") == (name, name)


def test_an_adapter_on_an_embedded_model_names_what_other_tools_can_load(tiny_gguf, tmp_path, monkeypatch):
    from trimtab.models.embedded import EmbeddedModel

    monkeypatch.setattr(EmbeddedModel, "_found", lambda self: tiny_gguf[0])
    saved = names_saved(load("smollm2-135m").model, tmp_path / "adapter")
    assert saved == ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m")


def test_a_revision_of_a_repository_is_loaded_and_its_adapters_tell_of_it(llama_folder, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--some--model", "a" * 40
    (repository / "refs" / "refs" / "pr").mkdir(parents=True)
    (repository / "refs" / "refs" / "pr" / "1").write_text(commit)
    (repository / "snapshots").mkdir()
    llama_folder.rename(repository / "snapshots" / commit)
    model = load("some/model@refs/pr/1").model
    assert names_saved(model, tmp_path / "adapter") == ("some/model", "some/model@refs/pr/1")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "refs/pr/1"
    with pytest.raises(UsageError, match=r"'some/model@refs/pr/2'.*needs a connection"):
        load("some/model@refs/pr/2")


def test_a_folder_with_an_at_sign_in_its_name_is_a_folder(llama_folder):
    folder = llama_folder.rename(llama_folder.parent / "model@2")
    assert load(str(folder)).path == folder


@pytest.mark.parametrize("name", ["some/model@", "a/b/c@main"])
def test_a_revision_of_nothing_is_refused(name):
    with pytest.raises(UsageError, match=r"cannot be a hub id|no file or folder"):
        load(name)


def test_a_name_that_is_nowhere_gets_the_nearest_one():
    with pytest.raises(UsageError, match=r"smollm2-135.*smollm2-135m, minilm.*connection.*did you mean smollm2-135m"):
        load("smollm2-135")


def test_a_hub_id_without_a_connection_says_so():
    with pytest.raises(UsageError, match=r"'someone/some-model'.*needs a connection"):
        load("someone/some-model")


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "absent.gguf", "a/b/c"])
def test_a_path_to_nothing_is_called_that(name):
    with pytest.raises(UsageError, match="no file or folder"):
        load(name)


def test_a_name_that_cannot_be_a_hub_id_is_called_that():
    with pytest.raises(UsageError, match="cannot be a hub id"):
        load("what is this")


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "model.txt"
    file.write_text("hello there")
    with pytest.raises(FormatError, match="not a GGUF file"):
        load(str(file))


def test_truncated_weights_are_named(llama_folder):
    weights = llama_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors is truncated"):
        load(str(llama_folder))


@pytest.mark.parametrize(
    "content", [b"", b"\x01", b"not safetensors at all, but long enough", b"\x05" + b"\0" * 7 + b"[1,2]"]
)
def test_foreign_weights_are_named(llama_folder, content):
    (llama_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        load(str(llama_folder))


def test_a_missing_shard_is_named(llama_folder):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"lacks model-00002-of-00002\.safetensors"):
        load(str(llama_folder))


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"no config\.json"):
        load(str(tmp_path))


def test_a_folder_with_a_gguf_file_points_to_it(tiny_gguf):
    with pytest.raises(FormatError, match=r"tiny model\.gguf, give the path of the file"):
        load(str(tiny_gguf[0].parent))


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_configuration_is_named(llama_folder, content):
    (llama_folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(FormatError, match=r"config\.json"):
        load(str(llama_folder))


def test_a_configuration_of_an_unknown_model_is_refused(llama_folder):
    (llama_folder / "config.json").write_text('{"model_type": "nosuchmodel"}')
    with pytest.raises(FormatError, match="nosuchmodel"):
        load(str(llama_folder))


def test_an_adapter_is_not_taken_for_a_model(tmp_path, llama_folder):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is an adapter, not a model"):
        load(str(tmp_path))
    (llama_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="a model and an adapter"):
        load(str(llama_folder))


def test_pickled_weights_are_refused_and_not_opened(llama_folder):
    (llama_folder / "model.safetensors").unlink()
    (llama_folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UsageError, match=r"only in pytorch_model\.bin.*never read"):
        load(str(llama_folder))


def test_no_weights_at_all_are_called_that(llama_folder):
    (llama_folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="no weights"):
        load(str(llama_folder))


def test_a_weight_that_is_missing_is_an_error_and_not_a_random_one(llama_folder):
    from safetensors.torch import load_file, save_file

    file = llama_folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks 1 of the model's weights, the first model\.layers\.1\.mlp\.up_proj"):
        load(str(llama_folder))


def test_a_weight_of_another_shape_is_refused(llama_folder):
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(FormatError, match="cannot be loaded"):
        load(str(llama_folder))


def test_a_model_of_another_kind_is_refused(llama_folder):
    with pytest.raises(UsageError, match="LlamaForCausalLM, which cannot be loaded as seq2seq-lm"):
        load(str(llama_folder), kind="seq2seq-lm")
    with pytest.raises(UsageError, match="kind is 'decoder'"):
        load(str(llama_folder), kind="decoder")
    with pytest.raises(UsageError, match="'minilm' is of kind encoder"):
        load("minilm")


def test_a_decoder_loads_as_an_encoder_without_its_head(llama_folder, caplog):
    assert not hasattr(load(str(llama_folder), kind="encoder").model, "lm_head")
    assert "lm_head.weight" in caplog.text


def test_an_encoder_decoder_loads(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert load(str(tmp_path / "t5"), kind="seq2seq-lm").model.config.is_encoder_decoder


def test_a_model_that_brings_code_needs_permission(llama_folder):
    config = {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (llama_folder / "config.json").write_text(json.dumps(config))
    (llama_folder / "theirs.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UsageError, match="--trust-remote-code"):
        load(str(llama_folder))


def test_a_broken_tokenizer_is_named(llama_folder):
    (llama_folder / "tokenizer.json").write_text("{ not json")
    with pytest.raises(FormatError, match=r"tokenizer in .* cannot be loaded"):
        load(str(llama_folder))


def test_an_unknown_dtype_or_device_is_refused(llama_folder):
    with pytest.raises(UsageError, match=r"dtype is 'bf61'.*did you mean bf16"):
        load(str(llama_folder), dtype="bf61")
    with pytest.raises(UsageError, match="device 'gpu'"):
        load(str(llama_folder), device="gpu")


def test_nothing_of_transformers_reaches_the_screen(llama_folder, capfd):
    load(str(llama_folder))
    assert capfd.readouterr() == ("", "")


def test_minilm_loads_as_an_encoder():
    if not EMBEDDED["minilm"].installed:
        pytest.skip(f"{EMBEDDED['minilm'].distribution} is not installed")
    loaded = load("minilm", kind="encoder")
    assert sum(p.numel() for p in loaded.model.parameters()) == EMBEDDED["minilm"].parameters
    assert loaded.tokenizer("hello")["input_ids"][0] == loaded.tokenizer.cls_token_id


@pytest.mark.slow
def test_smollm2_knows_more_than_chance_and_answers(monkeypatch):
    """Uses the user's own cache, so that the conversion is made at most once."""
    if not EMBEDDED["smollm2-135m"].installed:
        pytest.skip(f"{EMBEDDED['smollm2-135m'].distribution} is not installed")
    monkeypatch.delenv("TRIMTAB_CACHE")
    from trimtab.tasks.generate import generate
    from trimtab.tasks.knowledge import questions
    from trimtab.tasks.likelihood import choice_scores

    loaded = load("smollm2-135m")
    assert sum(p.numel() for p in loaded.model.parameters()) == EMBEDDED["smollm2-135m"].parameters
    [answer] = generate(
        loaded.model,
        loaded.tokenizer,
        [[{"role": "user", "content": "What is the capital of France?"}]],
        max_new_tokens=12,
    )
    assert "Paris" in answer
    result = choice_scores(loaded.model, loaded.tokenizer, questions()[:24])
    assert result.interval.low > result.chance
