"""Adapter folders that are broken, foreign or for another model, and saving that is whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import trimtab
from toys import assert_same, built, numbers, reader, seer, snapshot, stir, tokens
from trimtab import Full, LoRA, TrimtabError, UsageError
from trimtab.errors import FormatError
from trimtab.files import StorageError

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "trimtab.json"
SMALL = LoRA(rank=2)
IDS = tokens(4, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter of `reader()`, biases and a head with it."""
    adapter = stir(trimtab.attach(reader(), SMALL, bias="all", extra_modules=["head"]))
    return adapter.save(tmp_path / "adapter")


def check_refused(folder: Path, message: str, model: Any = None, error: type[TrimtabError] = UsageError) -> None:
    model = reader() if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=message) as raised:
        trimtab.load(model, folder)
    assert raised.value.exit_code == 2
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_tensor_file_is_refused(share: float, folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    check_refused(folder, "is not a whole safetensors file.*truncated or of another format", error=FormatError)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x04pickle", b"\0" * 64, b"PK\x03\x04" + b"\0" * 60])
def test_a_file_of_another_format_is_refused(content: bytes, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(content)
    check_refused(folder, "is not a whole safetensors file", error=FormatError)


def test_tensors_of_something_else_are_refused_by_name(folder: Path) -> None:
    save_file({"model.layers.0.weight": torch.ones(2)}, folder / WEIGHTS)
    check_refused(folder, "has a foreign tensor 'model.layers.0.weight'", error=FormatError)
    save_file({}, folder / WEIGHTS)
    check_refused(folder, "holds no tensors", error=FormatError)


def test_a_folder_with_pickled_weights_alone_is_refused_without_unpickling(folder: Path) -> None:
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(folder / "unpickled"),)

    (folder / WEIGHTS).unlink()
    torch.save(Trap(), folder / "adapter_model.bin")
    check_refused(folder, r"holds only pickled weights \(.bin\), which are not loaded")
    assert not (folder / "unpickled").exists()


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    check_refused(folder, f"{missing} does not exist")


def test_a_path_that_is_no_folder_is_refused(folder: Path) -> None:
    check_refused(folder / "nowhere", "is not a folder: give the one that holds adapter_config.json")
    check_refused(folder / WEIGHTS, "is not a folder")


def test_a_run_s_folder_is_told_where_its_adapter_is(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "adapter")
    check_refused(run, r"is a run's folder: its adapter is in .*run/adapter")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON.*line 1, column 1"),
        ('{"peft_type": "LORA",}', "is not JSON"),
        ("[1, 2]", "must hold keys and values, but holds a list"),
        ('{"r": 2}', "has no 'peft_type'"),
        ('{"peft_type": "ADAPTION_PROMPT"}', "is a PEFT 'ADAPTION_PROMPT' adapter"),
        ('{"peft_type": "PROMPT_TUNING"}', "does not say how many virtual tokens it has"),
        ('{"peft_type": "LORA", "r": "many"}', "rank is 'many', but must be a whole number"),
        ('{"peft_type": "LORA", "r": 0}', "rank is 0, but must be"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": "big"}', "alpha is 'big', but must be a number"),
        ('{"peft_type": "LORA", "r": 2, "rank_pattern": [1]}', "rank_pattern is .*, but must be a mapping"),
        ('{"peft_type": "LORA", "r": 2, "bias": "some"}', "bias is 'some', but must be one of none, all, lora_only"),
        ('{"peft_type": "LORA", "r": 2, "frobnicate": true}', "does not have: frobnicate=True"),
    ],
)
def test_a_broken_configuration_is_refused_with_the_reason(text: str, message: str, folder: Path) -> None:
    (folder / OWN).unlink()
    (folder / CONFIG).write_text(text)
    check_refused(folder, message)


def test_a_configuration_in_another_encoding_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_bytes('{"peft_type": "LÖRA"}'.encode("latin-1"))
    check_refused(folder, "is not JSON: .* can't decode", error=FormatError)


@pytest.mark.parametrize("text", ["{}", '{"method": {}}', '{"method": 3, "placement": {}, "provenance": {}}'])
def test_a_broken_record_of_ours_is_refused(text: str, folder: Path) -> None:
    (folder / OWN).write_text(text)
    check_refused(folder, "trimtab.json is broken: it must hold method, placement and provenance", error=FormatError)


def test_unknown_keys_in_our_record_are_refused_by_name(folder: Path) -> None:
    own = json.loads((folder / OWN).read_text())
    own["method"]["ranc"] = 3
    (folder / OWN).write_text(json.dumps(own))
    check_refused(folder, "unknown key 'ranc'; did you mean .*rank")
    own["method"].pop("ranc")
    own["placement"]["target"] = []
    (folder / OWN).write_text(json.dumps(own))
    check_refused(folder, "unknown key 'target'; did you mean targets")
    own["placement"].pop("target")
    own["method"]["name"] = "lorra"
    (folder / OWN).write_text(json.dumps(own))
    check_refused(folder, "unknown method 'lorra'; did you mean lora")


def test_an_adapter_of_a_type_of_ours_needs_its_record_as_it_was(tmp_path: Path) -> None:
    folder = stir(trimtab.attach(reader(), Full())).save(tmp_path / "a")
    config = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(config.replace('"bias": "none"', '"bias": "all"'))
    check_refused(folder, "was changed after it was saved", error=FormatError)
    (folder / CONFIG).write_text(config)
    (folder / OWN).unlink()
    check_refused(folder, "lacks trimtab.json", error=FormatError)


def test_an_adapter_of_another_base_names_the_first_misfit(folder: Path) -> None:
    check_refused(folder, "it adapts 'blocks.0.out', which this model does not have", model=seer(), error=FormatError)
    other = reader()
    other.blocks[1].qkv = nn.Linear(8, 21)
    check_refused(
        folder, r"does not fit this model at blocks.1.qkv: 'B' is \[24, 2\] in the file, but \[21, 2\]", model=other
    )
    other = reader()
    other.head = nn.Linear(8, 5)
    check_refused(folder, r"'head.bias' is \[3\] in the file, but \[5\] here", model=other)
    other = reader()
    other.norm = nn.LayerNorm(8, bias=False)
    check_refused(folder, "it holds 'norm.bias', which the model has not", model=other)
    other = reader()
    other.blocks[0].out = nn.Identity()
    check_refused(folder, "adapts 'blocks.0.out', which this model does not have", model=other)


def test_an_adapter_of_another_depth_is_refused(tmp_path: Path) -> None:
    import transformers as t

    folder = stir(trimtab.attach(built("llama"), SMALL)).save(tmp_path / "a")
    config = built("llama").config
    config.num_hidden_layers = 1
    check_refused(folder, "adapts 'model.layers.1.mlp.down_proj'", model=t.LlamaForCausalLM(config))


@pytest.mark.parametrize("drop", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(drop: str, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(next(key for key in tensors if drop in key))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    check_refused(folder, "but a linear needs one A and one B", error=FormatError)


def test_the_tensors_of_two_adapters_in_one_file_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    twice = {k.replace("lora_A", "lora_A.a").replace("lora_B", "lora_B.a"): t for k, t in tensors.items()}
    twice |= {k.replace("lora_A", "lora_A.b").replace("lora_B", "lora_B.b"): t.clone() for k, t in tensors.items()}
    save_file(twice, folder / WEIGHTS, metadata={"format": "pt"})
    check_refused(folder, "needs one A and one B", error=FormatError)


def test_a_foreign_tensor_of_a_dense_change_is_refused(tmp_path: Path) -> None:
    folder = stir(trimtab.attach(reader(), Full(), targets="head")).save(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.head.full.momentum"] = torch.ones(1)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    check_refused(folder, "the file has a foreign 'momentum' here")


def test_a_rank_that_the_configuration_denies_is_refused(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "r": 3}))
    check_refused(folder, r"'A' is \[2, 8\] in the file, but \[3, 8\] here", error=FormatError)


def test_loading_under_a_name_in_use_is_refused(folder: Path) -> None:
    model = reader()
    trimtab.load(model, folder)
    before = snapshot(model)
    with pytest.raises(UsageError, match="already has an adapter 'default'"):
        trimtab.load(model, folder)
    assert_same(before, snapshot(model))


def test_a_module_read_by_its_parent_is_refused_when_loaded(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    folder = stir(trimtab.attach(Model(), SMALL, targets="head")).save(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    extra = {"base_model.model.attention.out_proj.bias": torch.ones(8)}
    save_file(tensors | extra, folder / WEIGHTS, metadata={"format": "pt"})
    check_refused(folder, "trains attention.out_proj.bias, which is inside a MultiheadAttention", model=Model())


def test_copies_keep_the_bits_of_the_file_on_a_base_of_fewer(folder: Path, tmp_path: Path) -> None:
    model = reader().to(torch.bfloat16)
    adapter = trimtab.load(model, folder)
    assert adapter.copies["norm"].bias.dtype == torch.float32
    assert adapter.deltas["head" if "head" in adapter.deltas else "blocks.0.qkv"].A.dtype == torch.float32
    assert model(tokens(2, 5)).dtype == torch.bfloat16
    adapter.save(tmp_path / "again")
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


def test_a_copy_of_fewer_bits_in_the_file_is_widened_to_the_base(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = "base_model.model.norm.bias"
    tensors[key] = tensors[key].to(torch.float16)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    bias = trimtab.load(reader(), folder).copies["norm"].bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, tensors[key].float())


def test_a_copied_statistic_in_another_dtype_is_told(tmp_path: Path, caplog) -> None:
    trimtab.attach(seer(), LoRA(rank=2), targets="conv", extra_modules=["head"]).save(tmp_path / "own")
    adapter = trimtab.load(seer().to(torch.bfloat16), tmp_path / "own")
    assert "head.1.running_mean' becomes torch.bfloat16, as in the model, from torch.float32" in caplog.text
    assert adapter.copies["head.1"].running_mean.dtype == torch.bfloat16


def test_tensors_keep_the_dtypes_they_have_in_the_file(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if "blocks.1.out.lora_A" in key)
    tensors[key] = tensors[key].to(torch.float16)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    adapter = trimtab.load(reader(), folder)
    assert adapter.deltas["blocks.1.out"].A.dtype == torch.float16
    assert adapter.deltas["blocks.1.out"].B.dtype == torch.float32
    adapter.save(folder.parent / "again")
    assert (folder / WEIGHTS).read_bytes() == (folder.parent / "again" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["qkv", "head"], "exclude": ["1.qkv"], "bias": "adapter-only"},
        {"targets": "qkv", "slices": {"qkv": (True, False, True)}, "extra_modules": ["head", "norm"]},
        {"targets": "re:.*out", "bias": "all"},
    ],
)
def test_what_the_user_wrote_is_kept_with_the_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    method = LoRA(rank=2, alpha=3.0, dropout=0.1, init="gaussian", rslora=True, alpha_pattern={"0.*": 7.0})
    adapter = stir(trimtab.attach(reader(), method, seed=5, **options))
    model = reader()
    loaded = trimtab.load(model, adapter.save(tmp_path / "a"))
    assert loaded.method == method
    assert loaded.placement == adapter.placement
    assert loaded.provenance["seed"] == 5
    assert loaded.whole == adapter.whole
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(t, adapter.state_dict()[k]) for k, t in loaded.state_dict().items())


@pytest.mark.parametrize("beside", ["config.json", "README.md"])
def test_saving_over_an_adapter_loses_nothing_that_stands_beside_it(beside: str, folder: Path) -> None:
    (folder / beside).write_text("mine")
    with pytest.raises(UsageError, match=f"holds more than an adapter \\({beside}\\), which would be lost"):
        trimtab.attach(reader(), SMALL).save(folder)
    assert (folder / beside).read_text() == "mine"


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_base_is_known_again_in_every_dtype(saved: torch.dtype, loaded: torch.dtype, tmp_path: Path) -> None:
    checkpoint = built("llama")
    folder = trimtab.attach(copy.deepcopy(checkpoint).to(saved), SMALL).save(tmp_path / "a")
    trimtab.load(checkpoint.to(loaded), folder)
    trimtab.load(copy.deepcopy(checkpoint).to(saved), folder, name="again")


def test_an_adapter_of_another_base_of_the_same_shapes_is_refused_unless_asked_for(tmp_path: Path) -> None:
    folder = trimtab.attach(reader(), SMALL).save(tmp_path / "a")
    check_refused(folder, "another base: there, the weight of .* any_base=True", reader(seed=1), FormatError)
    assert trimtab.load(reader(seed=1), folder, any_base=True).deltas
    (folder / OWN).unlink()  # as PEFT saves it
    assert trimtab.load(reader(seed=1), folder).deltas


def test_a_base_with_an_adapter_merged_into_it_is_another_base(tmp_path: Path) -> None:
    model = reader()
    folder = trimtab.attach(model, SMALL, name="first").save(tmp_path / "first")
    change = stir(trimtab.attach(model, SMALL, name="second"), size=0.02)
    trimtab.merge(change)
    kept = trimtab.adapters(model)["first"].save(tmp_path / "while-merged")
    merged = reader()
    merged.load_state_dict({k: t for k, t in model.state_dict().items() if "deltas" not in k}, strict=False)
    for place in (folder, kept):
        check_refused(place, "another base", merged, FormatError)
        assert trimtab.load(reader(), place).deltas, "what is merged in is not the base"


def test_a_head_that_is_made_afresh_at_each_load_is_no_other_base(tmp_path: Path) -> None:
    folder = trimtab.attach(reader(), SMALL, extra_modules=["head"]).save(tmp_path / "a")
    other = reader()
    nn.init.normal_(other.head.weight, generator=torch.Generator().manual_seed(9))
    assert trimtab.load(other, folder).copies


@pytest.mark.parametrize(
    "broken", [[1], {"head": 3}, {"head": "zz"}, {"head": "abc"}, {"head": "abcdef"}, {"head": ""}]
)
def test_a_broken_fingerprint_is_refused(broken: Any, tmp_path: Path) -> None:
    folder = trimtab.attach(reader(), SMALL, targets=["head"]).save(tmp_path / "a")
    own = json.loads((folder / OWN).read_text())
    (folder / OWN).write_text(json.dumps({**own, "base": broken}))
    check_refused(folder, "trimtab.json is broken: 'base' must hold values", error=FormatError)


def test_saving_replaces_an_adapter_and_nothing_else(folder: Path) -> None:
    adapter = stir(trimtab.attach(reader(), SMALL))
    old = (folder / WEIGHTS).read_bytes()
    adapter.save(folder)
    assert (folder / WEIGHTS).read_bytes() != old
    assert sorted(p.name for p in folder.parent.iterdir()) == ["adapter"], "no partial folders are left"
    other = folder.parent / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("cat")
    for place in (other, other / "cat.jpg"):
        with pytest.raises(UsageError, match="exists and is something else"):
            adapter.save(place)
    assert (other / "cat.jpg").read_text() == "cat"


def test_a_folder_that_cannot_be_written_is_told(folder: Path, monkeypatch) -> None:
    adapter = stir(trimtab.attach(reader(), SMALL))
    with pytest.raises(StorageError, match=r"cannot write .*inside: a part of that path is a file"):
        adapter.save(folder / WEIGHTS / "inside")

    def forbidden(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("trimtab.files._folder_beside", forbidden)
    with pytest.raises(StorageError, match=r"cannot be written \(Permission denied\): choose another folder") as error:
        adapter.save(folder.parent / "new")
    assert error.value.exit_code == 2
    assert not (folder.parent / "new").exists()


def test_a_file_that_may_not_grow_leaves_the_earlier_adapter_whole(folder: Path) -> None:
    """The operating system's own refusal in the middle of the tensor file, by a limit on the size of files."""
    adapter = stir(trimtab.attach(reader(), SMALL))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*adapter"):
            adapter.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_a_full_disk_leaves_the_earlier_adapter_whole(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode
    ):
        pytest.skip("a small disk can only be mounted by root")
    try:
        adapter = stir(trimtab.attach(reader(), SMALL))
        folder = adapter.save(disk / "adapter")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        (disk / "filler").write_bytes(b"x" * (32 << 10))
        big = stir(trimtab.attach(nn.Sequential(nn.Linear(100, 100)), Full()))
        with pytest.raises(StorageError, match=r"no space left on the disk of .*: free some") as error:
            big.save(folder)
        assert error.value.exit_code == 2
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert sorted(p.name for p in disk.iterdir()) == ["adapter", "filler"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_save_killed_at_any_moment_leaves_an_adapter_whole(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    adapter = trimtab.attach(model, LoRA(rank=32))
    folder, seen = tmp_path / "adapter", set()
    chance = random.Random(3)

    def fill(value: float) -> None:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.fill_(value)

    fill(0.0)
    adapter.save(folder)
    for child_number in range(30):
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            for number in range(1, 10_000):
                fill(10_000.0 * child_number + number)
                adapter.save(folder)
                os.write(tell, b"x")
            os._exit(0)
        os.read(ready, 1)
        time.sleep(chance.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready), os.close(tell)
        values = {value for tensor in load_file(folder / WEIGHTS).values() for value in tensor.unique().tolist()}
        assert len(values) == 1
        assert json.loads((folder / CONFIG).read_text())["peft_type"] == "LORA"
        seen |= values
    assert len(seen) > 3, "the children did save"
    adapter.save(folder)
    assert torch.equal(load_file(folder / WEIGHTS)["base_model.model.0.lora_A.weight"], adapter.deltas["0"].A)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_error_while_writing_leaves_no_partial_folder(folder: Path, monkeypatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adapter = stir(trimtab.attach(reader(), SMALL))
    monkeypatch.setattr("trimtab.formats.peft_write.write_tensors", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapter.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_loading_runs_no_code_of_the_folder(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    model = reader()
    trimtab.load(model, folder)
    assert not torch.equal(model(IDS), reader()(IDS))
    assert numbers(1).shape == (1,)
