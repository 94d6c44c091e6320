"""trimtab train, on a tiny model: what it says, what it writes, what it refuses."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess

import pytest
import torch
import yaml
from tiny_command_line import files, rows, weights, write_rows


def test_a_run_folder_holds_what_it_should(train, tmp_path):
    done = train(tmp_path / "run", "--save-every", 1)
    assert done.code == 0, done.err
    found = files(tmp_path / "run")
    for name in ("config.yaml", "metrics.jsonl", "result.json", "layers.json", "adapter/adapter_config.json"):
        assert name in found
    assert not [name for name in found if "partial" in name]
    assert "16 rows, prompt-completion layout" in done.out
    assert re.search(r"trained in [\d.]+ s, [\d]+ tokens/s, loss [\d.]+ nats per token", done.out)
    assert f"report {tmp_path / 'run'}" in done.out


def test_json_is_one_object_with_the_figures_and_the_rest_is_told_elsewhere(train, tmp_path, data):
    done = train(tmp_path / "run", "--json", "--eval-data", data / "eval.jsonl")
    result = done.json
    for key in ("seconds", "real_tokens", "supervised_tokens", "tokens_per_second", "train_loss", "eval_loss"):
        assert isinstance(result[key], int | float), key
    assert result["peak_rss_bytes"] > 50e6
    assert result["adapter"] == str(tmp_path / "run" / "adapter")
    assert result["steps"] == 2
    assert "16 rows" in done.err
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


def test_quiet_tells_the_result_alone(train, tmp_path):
    done = train(tmp_path / "run", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(rf"trained in [^\n]+\nadapter: {tmp_path}/run/adapter\n", done.out)
    json_too = train(tmp_path / "again", "--quiet", "--json")
    assert json_too.json["steps"] == 2
    assert json_too.err == ""


def test_without_a_terminal_a_plain_line_comes_now_and_then(train, tmp_path, monkeypatch):
    assert "training" not in train(tmp_path / "short").err
    monkeypatch.setattr("trimtab.cli.plain_lines.FIRST_SECONDS", -1.0)
    monkeypatch.setattr("trimtab.cli.plain_lines.EVERY_SECONDS", 0.0)
    done = train(tmp_path / "run", "--json")
    assert "training: 0 of 2 steps\n" in done.err
    line = r"training, loss [\d.]+: 1 of 2 steps, [\d.]+ (steps/s|s/step), ETA \d+:\d\d:\d\d\n"
    assert re.search(line, done.err)
    assert done.json["steps"] == 2
    assert train(tmp_path / "quiet", "--quiet").err == ""


def test_the_saved_config_gives_the_same_run_again(train, trimtab, tmp_path):
    train(tmp_path / "one", "--dropout", 0.2, "--schedule", "cosine", "--targets", "q_proj", "v_proj", "--seed", 4)
    config = tmp_path / "one" / "config.yaml"
    assert trimtab("train", "--config", config, "--out", tmp_path / "two").code == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert config.read_text() == (tmp_path / "two" / "config.yaml").read_text()
    trimtab("train", "--config", config, "--out", tmp_path / "three", "--seed", 5)
    assert weights(tmp_path / "one") != weights(tmp_path / "three")


def test_the_saved_config_holds_what_was_measured(trimtab, model, data, tmp_path):
    trimtab("train", "--model", model, "--data", data / "train.jsonl", "--out", tmp_path / "run", "--max-steps", 1)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["dtype"] in ("float32", "bfloat16")
    assert config["threads"] >= 1


def test_runs_without_a_name_are_numbered(trimtab, model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        done = trimtab(
            "train", "--model", model, "--data", data / "train.jsonl", "--max-steps", 1, "--threads", 1, "--json"
        )
        assert done.json["adapter"] == f"runs/train-{number}/adapter"


def test_full_fine_tuning_and_patterns_go_through_the_command_line(trimtab, model, data, tmp_path):
    fixed = ["train", "--model", model, "--data", data / "train.jsonl", "--max-steps", 2, "--threads", 1, "--json"]
    full = trimtab(*fixed, "--out", tmp_path / "full", "--method", "full", "--targets", "q_proj").json
    assert full["trainable_parameters"] == 2 * 32 * 32
    lora = trimtab(
        *fixed, "--out", tmp_path / "lora", "--targets", "q_proj", "--rank", 4, "--rank-pattern", "layers.0.*=2"
    ).json
    assert lora["trainable_parameters"] == 64 * (4 + 2)


def test_training_reads_the_splits_asked_for(train, tmp_path, data, monkeypatch):
    import sys

    asked = []

    class Fake:
        @staticmethod
        def load_dataset(name, split):
            asked.append((name, split))
            return rows(0, 4) if split == "small" else rows(4, 6)

    monkeypatch.setitem(sys.modules, "datasets", Fake())
    flags = ["--data", "some/rows", "--split", "small", "--eval-data", "some/rows", "--eval-split", "test"]
    done = train(tmp_path / "run", *flags)
    assert done.code == 0, done.err
    assert asked == [("some/rows", "small"), ("some/rows", "test")]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["split"], config["eval_split"]) == ("small", "test")


# --- what it warns of and refuses ---


def test_contamination_is_a_loud_warning(train, tmp_path, data):
    leaked = write_rows(tmp_path / "eval.jsonl", [*rows(0, 3), *rows(50, 51)])
    done = train(tmp_path / "run", "--eval-data", leaked)
    assert done.code == 0
    told = "contamination: 3 of the 4 rows of eval.jsonl (75%)"
    assert f"warning: {told}" in done.err
    (recorded,) = json.loads((tmp_path / "run" / "result.json").read_text())["warnings"]
    assert recorded.startswith(told)


def test_cut_answers_are_a_loud_warning(train, tmp_path):
    done = train(tmp_path / "run", "--max-length", 46)
    assert "answers cut at max_length (46)" in done.err
    assert done.code == 0


def test_warnings_are_told_even_when_quiet(train, tmp_path):
    assert "answers cut" in train(tmp_path / "run", "--max-length", 46, "--quiet").err


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.jsonl", b"", "rows.jsonl is empty"),
        ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n', "row 2"),
        ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": ""}\n', "row 2"),
        ("rows.jsonl", b'{"prompt": "\xff", "completion": "b"}\n', "not valid UTF-8"),
        ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n{"pro', "broken JSON at line 2"),
        ("rows.jsonl", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "is a PNG image"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 50)[:-12], "truncated gzip"),
        ("rows.jsonl", b'{"question": "a"}\n', "rows.jsonl"),
    ],
    ids=["empty", "no-answer", "blank-answer", "not-utf8", "cut-off", "image", "cut-gzip", "unknown-keys"],
)
def test_bad_data_is_told_before_anything_is_loaded(trimtab, tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    done = trimtab("train", "--model", "no-such-model", "--data", tmp_path / name, "--out", tmp_path / "run")
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_nothing_supervised_is_refused(train, tmp_path):
    done = train(tmp_path / "run", "--max-length", 10)
    assert done.code == 2
    assert "no token is supervised" in done.err
    assert not (tmp_path / "run").exists()


def test_a_conversation_without_a_chat_template_is_refused(trimtab, model, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    (plain / "chat_template.jinja").unlink()
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    data = write_rows(tmp_path / "chats.jsonl", chats)
    done = trimtab("train", "--model", plain, "--data", data, "--out", tmp_path / "run", "--threads", 1)
    assert done.code == 2
    assert "no chat template" in done.err


def test_a_model_without_a_tokenizer_is_refused(trimtab, model, data, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, bare)
    done = trimtab("train", "--model", bare, "--data", data / "train.jsonl", "--out", tmp_path / "run", "--threads", 1)
    assert done.code == 2
    assert "has no tokenizer" in done.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--targets", "q_prj"], "q_proj"),
        (["--rank", 0], "rank is 0"),
        (["--rank", 33], "above"),
        (["--threads", 0], "threads is 0, but must be at least 1"),
        (["--eval-every", 2], "eval_every needs evaluation data"),
        (["--keep-best"], "keep_best needs evaluation data"),
        (["--layout", "alpca"], "alpaca"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_setting_that_cannot_be_is_told(train, tmp_path, flags, told):
    done = train(tmp_path / "run", *flags)
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err


def test_a_missing_logger_is_told_before_training(train, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    done = train(tmp_path / "run", "--log-to", "wandb")
    assert done.code == 2
    assert "pip install wandb" in done.err
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_had_offline_is_told(trimtab, data, tmp_path):
    done = trimtab("train", "--model", "nobody/nothing", "--data", data / "train.jsonl", "--out", tmp_path / "run")
    assert done.code == 2
    assert "no model 'nobody/nothing'" in done.err


def test_code_that_comes_with_a_model_is_not_run(trimtab, model, data, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(model, own)
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    done = trimtab("train", "--model", own, "--data", data / "train.jsonl", "--out", tmp_path / "run", "--threads", 1)
    assert done.code == 2
    assert "--trust-remote-code" in done.err
    assert not (tmp_path / "ran").exists()


def test_a_file_in_the_way_of_the_run_is_told_at_once(train, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file, but the run needs a folder" in train(tmp_path / "file").err
    done = train(tmp_path / "file" / "run")
    assert done.code == 2
    assert f"{tmp_path / 'file'} is a file" in done.err


def test_a_folder_that_cannot_be_written_is_told_at_once(train, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *args, **kwargs: False)  # root may write anywhere
    done = train(tmp_path / "run")
    assert done.code == 2
    assert "cannot be written" in done.err


def test_out_of_memory_says_what_to_lower(train, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    def forward(self, *args, logits_to_keep=0, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    done = train(tmp_path / "run")
    assert done.code == 2
    assert "out of memory: lower micro_batch (now 8), max_length or the rank" in done.err


def test_a_loss_that_is_not_finite_fails_and_keeps_the_adapter(train, tmp_path):
    done = train(tmp_path / "run", "--lr", 1e30, "--max-steps", 20, "--epochs", 20)
    assert done.code == 1
    assert re.search(r"step \d+ has .*\(look at its rows: [\d, ]+\); the last good adapter", done.err)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


# --- the terminal ---


def test_a_terminal_shows_a_bar_with_rate_and_time_left(process, model, data, tmp_path):
    import os
    import pty

    controller, terminal = pty.openpty()
    child = process(
        "train", "--model", model, "--data", data / "train.jsonl", "--threads", 1, "--epochs", 30, "--out",
        tmp_path / "run", stdout=subprocess.DEVNULL, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(controller, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(controller)
    assert child.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"training, loss [\d.]+ .* \d+/60 +[\d.]+ (steps/s|s/step) +ETA +\d+:\d\d:\d\d", text)


def drawn_text(screen):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen._bars.file.getvalue())


def test_slow_work_is_told_in_seconds_a_step():
    import io

    from rich.console import Console

    from trimtab.cli.common import Output, Screen

    screen = Screen(Output())
    screen._bars = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={})
    now = [0.0]
    screen._bars.get_time = lambda: now[0]
    with screen.progress("training", "steps") as update:
        for step in range(1, 4):
            now[0] += 40.0  # longer than rich would remember by itself
            update(step, 10)
    text = drawn_text(screen)
    assert "40.0 s/step" in text
    assert "ETA 0:04:40" in text
    with screen.progress("searching", "runs") as update:
        update(3, None)
    text = drawn_text(screen)
    assert "searching" in text
    assert "3 runs" in text
    assert "ETA" not in text.rpartition("searching")[2]


@pytest.mark.parametrize(
    ("method", "ends"), [("houlsby", {"o_proj", "down_proj"}), ("ia3", {"k_proj", "v_proj", "down_proj"})]
)
def test_without_targets_a_method_goes_where_it_goes_by_default(trimtab, model, data, tmp_path, method, ends):
    fixed = ["train", "--model", model, "--data", data / "train.jsonl", "--threads", 1, "--dtype", "float32"]
    done = trimtab(*fixed, "--out", tmp_path / "run", "--method", method, "--max-steps", 1, "--json")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == ends
    assert done.json["adapted_modules"] == 2 * len(ends)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["targets"] == []
    again = trimtab("train", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again", "--json")
    assert again.json["train_loss"] == done.json["train_loss"]
    lacking = trimtab(*fixed, "--out", tmp_path / "none", "--method", "bitfit", "--max-steps", 1)
    assert lacking.code == 2
    assert "no linear layer of this model has a bias" in lacking.err
