"""trimtab measure dimension: what it says, what it leaves, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.cli import run

QUICK = ["--workers", "1", "--seeds", "2"]
TOY = ["--task", "toy", "--threshold", "absolute", "--share", "0.99", "--lr-scale", "none", *QUICK]


def test_the_toy_has_dimension_ten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measure", "dimension", *TOY, "--grid", "8,9,10,11", "--out", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["crossing"]["first"] == 10
    assert 9 < told["crossing"]["d"] <= 10
    assert told == json.loads((tmp_path / "results.json").read_text()) | {"report": told["report"]}
    page = (tmp_path / "report.html").read_text()
    assert "Intrinsic dimension of toy" in page
    assert "exp(-loss)" in page
    assert "chance" in page
    before = (tmp_path / "runs.jsonl").read_bytes()
    assert run(["measure", "dimension", *TOY, "--grid", "8,9,10,11", "--out", str(tmp_path), "--json"]) == 0
    assert (tmp_path / "runs.jsonl").read_bytes() == before, "nothing is trained twice"
    assert (tmp_path / "report.html").read_text() == page


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "mnist"], "there is no problem 'mnist'"),
        (["--task", "mnist-fc", "--data-dir", "/nowhere"], "which is no folder"),
        (["--grid", "0,5"], "d is 0, but must be at least 1"),
        (["--grid", "5,1000000"], "d is 1000000, but must be at least 1 and at most D ="),
        (["--grid", "five"], "must be numbers with commas"),
        (["--projection", "none"], "unknown projection 'none'"),
        (["--mode", "said"], "--mode is for a task with --model"),
        (["--rows", "5"], "--rows is for a task with --model"),
        (["--model", "minilm", "--task", "sst2", "--width", "5"], "--width is for a task without --model"),
        (["--share", "1.5"], "must be above 0 and at most 1"),
        (["--workers", "0"], "workers is 0"),
        (["--seeds", "0"], "seeds is 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_any_training(flags: list[str], said: str, tmp_path: Path, capsys) -> None:
    assert run(["measure", "dimension", *flags, "--out", str(tmp_path / "new")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new" / "runs.jsonl").exists()


def test_a_threshold_that_guessing_passes_is_refused(capsys) -> None:
    assert run(["measure", "dimension", *QUICK, "--epochs", "1", "--share", "0.1"]) == 1
    assert "any d would pass" in capsys.readouterr().err
