"""trimtab train --method subspace: a file of a few kilobytes that is generated from, merged and exported."""

from __future__ import annotations

import json


def test_a_subspace_is_trained_saved_merged_and_exported(trimtab, model, data, tmp_path):
    run, fixed = tmp_path / "run", ["--model", model, "--adapter", tmp_path / "run" / "adapter"]
    done = trimtab(
        "train", "--model", model, "--data", data / "train.jsonl", "--out", run, "--threads", 1, "--max-steps", 2,
        "--dtype", "float32", "--method", "subspace", "--dim", 1000, "--mode", "said",
        "--projection", "fastfood-blocks",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size < 5000
    method = json.loads((run / "adapter" / "trimtab.json").read_text())["method"]
    assert (method["dim"], method["mode"], method["projection"]) == (1000, "said", "fastfood-blocks")
    merged = trimtab("merge", *fixed, "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    dense = trimtab("export", *fixed, "--format", "dense", "--out", tmp_path / "dense")
    assert dense.out == f"dense adapter: {tmp_path / 'dense'}\n"
    assert (tmp_path / "dense" / "adapter_model.safetensors").stat().st_size > 60_000
    low_rank = trimtab("export", *fixed, "--out", tmp_path / "peft")
    assert low_rank.code == 2
    assert "no low-rank factors" in low_rank.err


def test_more_dimensions_than_there_are_is_said_in_one_line(trimtab, model, data, tmp_path):
    done = trimtab(
        "train", "--model", model, "--data", data / "train.jsonl", "--out", tmp_path / "run", "--threads", 1,
        "--max-steps", 1, "--method", "subspace", "--dim", 10**9,
    )  # fmt: skip
    assert done.code == 2
    assert "d is 1000000000, but must be from 1 to" in done.err
