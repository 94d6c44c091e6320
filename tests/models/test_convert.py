from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import FormatError, UsageError
from trimtab.models import convert
from trimtab.models.convert import cache_folder, safetensors_folder


def convert_and_report(path, queue):
    said = []
    queue.put((str(safetensors_folder(Path(path), progress=said.append)), said))


def test_the_folder_holds_exactly_what_the_file_says(tiny_gguf):
    from safetensors.numpy import load_file

    path, arrays = tiny_gguf
    weights = load_file(safetensors_folder(path) / "model.safetensors")
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ):
        assert weights[ours].dtype == np.float32
        assert np.array_equal(weights[ours], arrays[theirs]), ours


def test_the_folder_loads_in_plain_transformers_with_its_tokenizer(tiny_gguf):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = safetensors_folder(tiny_gguf[0])
    AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"
    assert "<|im_end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_folder_does_not_tell_where_the_file_was(tiny_gguf, tmp_path):
    folder = safetensors_folder(tiny_gguf[0])
    for file in folder.glob("*.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8"), file


def test_the_second_time_nothing_is_converted(tiny_gguf, monkeypatch):
    folder = safetensors_folder(tiny_gguf[0])
    monkeypatch.setattr(convert, "_convert", lambda *rest: pytest.fail("converted again"))
    assert safetensors_folder(tiny_gguf[0]) == folder


def test_a_file_with_other_content_gets_another_folder(tiny_gguf, write_gguf):
    first = safetensors_folder(tiny_gguf[0])
    write_gguf(tiny_gguf[0], seed=1)
    assert safetensors_folder(tiny_gguf[0]) != first


def test_a_folder_that_lost_part_of_a_file_is_made_again(tiny_gguf):
    weights = safetensors_folder(tiny_gguf[0]) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert (safetensors_folder(tiny_gguf[0]) / "model.safetensors").read_bytes() == whole


def test_a_conversion_that_fails_leaves_nothing_behind(tiny_gguf, own_cache, monkeypatch):
    monkeypatch.setattr(convert, "_forget_origin", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        safetensors_folder(tiny_gguf[0])
    assert [entry for entry in own_cache.iterdir() if entry.is_dir()] == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_killed_conversion_is_made_again(tiny_gguf, own_cache):
    child = os.fork()
    if child == 0:
        convert._forget_origin = lambda folder: time.sleep(600)
        safetensors_folder(tiny_gguf[0])
        os._exit(0)
    while not list(own_cache.glob(".*.partial/tokenizer_config.json")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the conversion ended by itself"
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    folder = safetensors_folder(tiny_gguf[0])
    assert [entry for entry in own_cache.iterdir() if entry.is_dir()] == [folder]


@pytest.mark.slow
def test_two_processes_at_once_convert_once(tiny_gguf, own_cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=convert_and_report, args=(str(tiny_gguf[0]), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    assert len({folder for folder, _ in results}) == 1
    assert sum(any(line.startswith("converting") for line in said) for _, said in results) == 1
    assert [entry for entry in own_cache.iterdir() if entry.is_dir()] == [Path(results[0][0])]


def test_a_full_disk_is_named_with_what_to_do(tiny_gguf, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"No space left on device; it takes up to .* GB.*TRIMTAB_CACHE"):
        safetensors_folder(tiny_gguf[0])


def test_a_cache_that_is_a_file_is_named(tiny_gguf, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match="cannot write the converted"):
        safetensors_folder(tiny_gguf[0], cache=tmp_path / "file")


def test_other_files_are_refused(tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 some archive")
    with pytest.raises(FormatError, match=r"other\.gguf is not a GGUF file"):
        safetensors_folder(other)
    with pytest.raises(UsageError, match="cannot read"):
        safetensors_folder(tmp_path / "absent.gguf")


def test_a_truncated_file_is_refused_by_name(tiny_gguf, own_cache):
    path, _ = tiny_gguf
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 5000])
    with pytest.raises(FormatError, match=r"tiny model\.gguf cannot be converted"):
        safetensors_folder(path)
    assert [entry for entry in own_cache.iterdir() if entry.is_dir()] == []


def test_an_unknown_architecture_is_refused_by_name(tmp_path, write_gguf):
    write_gguf(tmp_path / "odd.gguf", architecture="nosuchmodel")
    with pytest.raises(FormatError, match=r"odd\.gguf cannot be converted.*nosuchmodel"):
        safetensors_folder(tmp_path / "odd.gguf")


def test_nothing_of_transformers_reaches_the_screen(tiny_gguf, capfd):
    safetensors_folder(tiny_gguf[0])
    assert capfd.readouterr() == ("", "")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(tmp_path / "given") == tmp_path / "given" / "models"
    assert cache_folder() == tmp_path / "own" / "models"
    monkeypatch.delenv("TRIMTAB_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "trimtab" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "trimtab" / "models"


def test_a_read_only_cache_that_has_the_folder_is_enough(tiny_gguf, monkeypatch):
    folder = safetensors_folder(tiny_gguf[0])
    monkeypatch.setattr(convert, "_convert_once", lambda *rest: pytest.fail("tried to write"))
    assert safetensors_folder(tiny_gguf[0]) == folder
