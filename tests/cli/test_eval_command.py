"""trimtab eval."""

from __future__ import annotations

import json
import re

import pytest
from tiny_command_line import stopped_after_two_batches

from made_up_questions import question_rows, write_questions


@pytest.fixture
def asked(trimtab, model, tmp_path):
    """asked(*flags): ask the tiny model twelve made-up questions of arc_easy."""
    write_questions(tmp_path / "questions", question_rows(12))
    write_questions(tmp_path / "questions", question_rows(5, seed=1), task="openbookqa")

    def call(*flags, tasks="arc_easy"):
        fixed = ["eval", "--model", model, "--tasks", tasks, "--data", tmp_path / "questions", "--threads", 1]
        return trimtab(*fixed, "--dtype", "float32", "--max-new-tokens", 4, *flags)

    return call


def test_a_table_has_each_task_with_interval_chance_and_majority(asked):
    done = asked(tasks="arc_easy,openbookqa")
    assert done.code == 0, done.err
    header, *rows = done.out.splitlines()[-3:]
    assert header.split() == ["task", "items", "accuracy", "95%", "interval", "chance", "majority", "unparseable"]
    assert [row.split()[:2] for row in rows] == [["arc_easy", "12"], ["openbookqa", "5"]]
    assert all(row.split()[-1] == "-" for row in rows)
    found = asked("--json", tasks="arc_easy,openbookqa").json["tasks"]
    assert [row["items"] for row in found] == [12, 5]
    assert found[0]["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    for row in found:
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]


def test_answers_that_cannot_be_read_are_a_share_of_their_own(asked):
    (found,) = asked("--scoring", "generation", "--json").json["tasks"]
    assert found["unparseable"] == 1.0  # a random model writes no answer
    assert found["accuracy"] == 0.0
    assert asked("--scoring", "generation").out.split()[-1] == "1.000"


def test_an_adapter_is_asked_in_the_models_place(asked, adapters, tmp_path):
    scores = []
    for name, flags in (("base", ()), ("sql", ("--adapter", adapters / "sql"))):
        assert asked("--out", tmp_path / name, *flags).code == 0
        lines = (tmp_path / name / "examples.jsonl").read_text().splitlines()
        scores.append([json.loads(line)["scores"] for line in lines])
    assert scores[0] != scores[1]


def test_a_limit_is_drawn_with_a_seed_and_said(asked, tmp_path):
    def indices(out, *flags):
        done = asked("--limit", 5, "--out", tmp_path / out, *flags)
        assert f"5 of 12 questions, drawn at random with seed {flags[1] if flags else 0}" in done.out
        return sorted(json.loads(line)["index"] for line in (tmp_path / out / "examples.jsonl").open())

    assert indices("a") == indices("b") != indices("c", "--seed", 1)


def test_ctrl_c_leaves_results_that_the_same_command_goes_on_from(asked, tmp_path, monkeypatch):
    whole = asked("--out", tmp_path / "whole", "--batch-size", 4, "--json").json
    calls = stopped_after_two_batches(monkeypatch)
    stopped = asked("--out", tmp_path / "cut", "--batch-size", 4)
    assert stopped.code == 130
    assert f"what is done is in {tmp_path / 'cut'}, and the same command goes on from there" in stopped.err
    again = asked("--out", tmp_path / "cut", "--batch-size", 4, "--json")
    assert calls == [4, 4, 4]
    assert "arc_easy: 8 of 12 questions are answered already" in again.err
    assert again.json["tasks"] == whole["tasks"]
    assert json.loads((tmp_path / "cut" / "figures.json").read_text()) == again.json
    lines = [sorted((tmp_path / name / "examples.jsonl").read_text().splitlines()) for name in ("whole", "cut")]
    assert lines[0] == lines[1]


def test_results_of_another_adapter_scoring_or_data_are_refused(asked, adapters, tmp_path):
    out = tmp_path / "out"
    asked("--out", out, "--limit", 2)
    done = asked("--out", out, "--adapter", adapters / "sql")
    assert done.code == 2
    assert f"{out} holds results of no adapter, but now it is {adapters / 'sql'}" in done.err
    assert "scoring likelihood, but now it is generation" in asked("--out", out, "--scoring", "generation").err
    write_questions(tmp_path / "questions", question_rows(12, seed=5))
    assert "arc_easy from another data file" in asked("--out", out).err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tasks", "arc_esy"], "unknown task 'arc_esy'; did you mean arc_easy"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "boolq"], "has no commonsense/boolq.test.json.gz"),
        (["--limit", "0"], "limit is 0, but must be at least 1"),
        (["--batch-size", "0"], "batch_size is 0, but must be at least 1"),
        (["--adapter", "nowhere"], "there is no adapter's folder nowhere"),
        (["--scoring", "guess"], "scoring is 'guess', but must be one of likelihood, generation"),
        (["--data", "nowhere"], "--data names nowhere, which is no folder"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_before_a_model_is_loaded(trimtab, tmp_path, flags, told):
    write_questions(tmp_path, question_rows(3))
    tasks = [] if "--tasks" in flags else ["--tasks", "arc_easy"]
    data = [] if "--data" in flags else ["--data", tmp_path]
    done = trimtab("eval", "--model", "no-such-model", *tasks, *data, *flags)
    assert done.code == 2
    assert told in done.err
    assert done.err.count("\n") == 1


def test_without_a_folder_of_data_it_is_said_how_to_name_one(trimtab, monkeypatch):
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    done = trimtab("eval", "--model", "no-such-model", "--tasks", "arc_easy")
    assert done.code == 2
    assert "commonsense/arc_easy.test.json.gz in it: name it with --data or in TRIMTAB_DATA" in done.err


def test_the_tasks_are_listed_with_the_command_that_runs_them(trimtab):
    found = {row["task"]: row["run by"] for row in trimtab("list", "tasks", "--json").json["tasks"]}
    assert found["piqa"] == "trimtab eval"
    assert found["naming"] == "trimtab demo"


def test_evaluating_on_a_terminal_counts_questions(terminal, model, tmp_path):
    write_questions(tmp_path, question_rows(4))
    drawn = terminal("eval", "--model", model, "--tasks", "arc_easy", "--data", tmp_path, "--batch-size", 1)
    assert re.search(r"arc_easy .* 4/4 +[\d.]+ (questions/s|s/question)", drawn)
