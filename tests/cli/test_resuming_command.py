"""trimtab train --resume, and the ways a run stops before its end."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
import yaml
from tiny_command_line import files, rows, weights, write_rows


def metrics(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


@pytest.fixture
def interrupted(train, tmp_path):
    """A finished run of six steps, and a copy of it as it was after four."""
    train(tmp_path / "whole", "--max-steps", 6, "--epochs", 4, "--save-every", 2, "--dropout", 0.1)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000006")
    return tmp_path / "whole", tmp_path / "cut"


def test_resuming_needs_the_folder_alone(interrupted, trimtab):
    whole, cut = interrupted
    done = trimtab("train", "--out", cut, "--resume", "--json")
    assert done.code == 0, done.err
    assert done.json["steps"] == 6
    assert "going on from step 4 of 6" in done.err
    assert weights(cut) == weights(whole)
    assert metrics(cut) == metrics(whole)


def test_resuming_a_finished_run_says_so_and_changes_nothing(train, trimtab, tmp_path):
    run = tmp_path / "run"
    train(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = trimtab("train", "--out", run, "--resume", "--json")
    assert done.code == 0, done.err
    assert "already finished: step 2 of 2" in done.err
    assert done.json == json.loads((run / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.fixture
def elsewhere(trimtab, model, data, tmp_path, monkeypatch):
    """A run started with relative paths and not finished, and the directory it was started in; we are in another."""
    home, away = tmp_path / "home", tmp_path / "away"
    away.mkdir()
    shutil.copytree(data, home)
    shutil.copytree(model, home / "model")
    monkeypatch.chdir(home)
    fixed = ["--model", "model", "--data", "train.jsonl", "--eval-data", "eval.jsonl", "--out", "run"]
    done = trimtab("train", *fixed, "--threads", 1, "--rank", 2, "--save-every", 1)
    assert done.code == 0, done.err
    shutil.rmtree("run/adapter")
    monkeypatch.chdir(away)
    return home


def test_resuming_goes_on_from_another_directory(elsewhere, trimtab):
    done = trimtab("train", "--out", elsewhere / "run", "--resume")
    assert done.code == 0, done.err
    assert "going on from step 2 of 2" in done.err


def test_resuming_names_data_that_is_gone_and_takes_it_from_where_it_is(elsewhere, trimtab):
    (elsewhere / "train.jsonl").rename(elsewhere / "moved.jsonl")
    done = trimtab("train", "--out", elsewhere / "run", "--resume")
    assert done.code == 2
    assert f"names {elsewhere / 'train.jsonl'}, which is not there: give --data with where it is now" in done.err
    done = trimtab("train", "--out", elsewhere / "run", "--resume", "--data", elsewhere / "moved.jsonl")
    assert done.code == 0, done.err
    (elsewhere / "model").rename(elsewhere / "other")
    shutil.rmtree(elsewhere / "run" / "adapter")
    done = trimtab("train", "--out", elsewhere / "run", "--resume")
    assert f"names the model {elsewhere / 'model'}, which is not there" in done.err


def test_resuming_takes_the_same_flags_again(interrupted, train):
    whole, cut = interrupted
    done = train(cut, "--max-steps", 6, "--epochs", 4, "--save-every", 2, "--dropout", 0.1, "--resume")
    assert done.code == 0, done.err
    assert weights(cut) == weights(whole)


def test_resuming_keeps_what_the_run_records(train, trimtab, tmp_path, data, monkeypatch):
    made = []

    class Log:
        def log(self, row):
            pass

        def close(self):
            pass

    monkeypatch.setattr("trimtab.train.metrics.make_logger", lambda name, folder: made.append(name) or Log())
    flags = ["--eval-data", data / "eval.jsonl", "--log-to", "tensorboard", "--samples", 1, "--save-every", 1]
    train(tmp_path / "run", *flags)
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "samples.jsonl").unlink()
    done = trimtab("train", "--out", tmp_path / "run", "--resume")
    assert done.code == 0, done.err
    assert made == ["tensorboard", "tensorboard"]
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 1


def test_resuming_may_record_something_else(interrupted, trimtab):
    whole, cut = interrupted
    done = trimtab("train", "--out", cut, "--resume", "--samples", 5)
    assert done.code == 0, done.err
    assert len((cut / "samples.jsonl").read_text().splitlines()) == 5
    assert weights(cut) == weights(whole)


def test_resuming_takes_the_default_of_a_key_that_the_run_did_not_know(interrupted, trimtab):
    whole, cut = interrupted
    config = yaml.safe_load((cut / "config.yaml").read_text())
    later = ("split", "eval_split", "log_to", "samples")
    (cut / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if k not in later}))
    done = trimtab("train", "--out", cut, "--resume")
    assert done.code == 0, done.err
    assert weights(cut) == weights(whole)


def test_resuming_with_another_recipe_names_the_keys(interrupted, trimtab):
    _, cut = interrupted
    before = files(cut)
    done = trimtab("train", "--out", cut, "--resume", "--lr", 1, "--rank", 2)
    assert done.code == 2
    assert "lr was None, and is 1.0 now" in done.err
    assert "rank was 4, and is 2 now" in done.err
    assert files(cut) == before


def test_resuming_with_other_data_under_the_same_name_is_refused(trimtab, model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows(0, 12))
    fixed = ["train", "--model", model, "--data", data, "--threads", 1, "--out", tmp_path / "run"]
    trimtab(*fixed, "--save-every", 1)
    shutil.rmtree(tmp_path / "run" / "adapter")
    write_rows(data, rows(1, 13))
    done = trimtab("train", "--out", tmp_path / "run", "--resume")
    assert done.code == 2
    assert "training data was '12 examples" in done.err


def test_resuming_what_is_no_run_is_told(trimtab, tmp_path):
    done = trimtab("train", "--out", tmp_path / "typo", "--resume")
    assert done.code == 2
    assert f"there is no run to resume in {tmp_path / 'typo'}" in done.err
    assert "give --out" in trimtab("train", "--model", "m", "--data", "d", "--resume").err


def test_resuming_a_run_that_had_not_begun_begins_it(train, tmp_path):
    done = train(tmp_path / "run", "--resume")
    assert done.code == 0
    assert "nothing to resume" in done.err
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_used_folder_is_not_overwritten(train, tmp_path):
    train(tmp_path / "run")
    before = weights(tmp_path / "run")
    done = train(tmp_path / "run", "--seed", 9)
    assert done.code == 2
    assert "is not empty: choose another folder, or go on with --resume" in done.err
    assert weights(tmp_path / "run") == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_a_run_that_is_stopped_goes_on(process, trimtab, model, data, tmp_path, sent):
    out = tmp_path / "a run"
    fixed = ["train", "--model", model, "--data", data / "train.jsonl", "--threads", 1, "--rank", 2, "--seed", 1]
    fixed += ["--dtype", "float32"]
    child = process(*fixed, "--epochs", 100_000, "--max-steps", 100_000, "--out", out)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text()) > 2000, child)
    child.send_signal(sent)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert f"trimtab: stopped: go on with python -m trimtab train --out '{out}' --resume" in err
    reached = len(metrics(out))
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{reached:06d}"]
    # The same run, made short, so that going on comes to an end.
    config = yaml.safe_load((out / "config.yaml").read_text())
    state = out / "checkpoints" / f"step-{reached:06d}" / "state.json"
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "max_steps": reached + 2}))
    state.write_text(state.read_text().replace('"max_steps": 100000', f'"max_steps": {reached + 2}'))
    done = trimtab("train", "--out", out, "--resume", "--json")
    assert done.code == 0, done.err
    trimtab(*fixed, "--epochs", 100_000, "--max-steps", reached + 2, "--out", tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")
    assert metrics(out) == metrics(tmp_path / "whole")


def wait_for(condition, child, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
