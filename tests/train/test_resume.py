"""A run that was stopped goes on as if it had never been: same weights, same metrics."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch

import trimtab
from tiny_training import make_examples, make_llama
from trimtab.errors import FormatError, UsageError
from trimtab.train.checkpoint import checkpoints, save_checkpoint
from trimtab.train.settings import Settings

DROPOUT = trimtab.LoRA(rank=2, alpha=4, dropout=0.25)
SETTINGS = {"epochs": 2, "schedule": "linear", "warm_up": 0.2, "save_every": 2}


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def weights(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("stop", range(1, 9))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": DROPOUT, "micro_batch": 2},
        {"method": DROPOUT, "eval_every": 2, "keep_best": True, "lr": 0.2, "eval_examples": make_examples(3, seed=8)},
        {"method": trimtab.Full(), "packing": "pack"},
    ],
    ids=["plain", "dropout-accumulated", "keep-best", "full-packed"],
)
def test_a_run_stopped_at_any_step_ends_the_same(run, stopped, tmp_path, stop, options):
    _, whole, _ = run(tmp_path / "whole", **SETTINGS, **options)
    with pytest.raises(stopped):
        run(tmp_path / "cut", stop=stop, **SETTINGS, **options)
    torch.rand(3)
    _, resumed, _ = run(tmp_path / "cut", resume=True, **SETTINGS, **options)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    for name in ("steps", "real_tokens", "supervised_tokens", "train_loss", "eval_loss", "eval_loss_before"):
        assert getattr(resumed, name) == getattr(whole, name)


def test_a_run_stopped_again_and_again_ends_the_same(run, stopped, same, tmp_path):
    whole, _, _ = run(method=DROPOUT, epochs=2)
    for stop in (3, 4, 7):
        with pytest.raises(stopped):
            run(tmp_path, method=DROPOUT, epochs=2, save_every=1, stop=stop, resume=stop > 3)
    state, result, reports = run(tmp_path, method=DROPOUT, epochs=2, save_every=1, resume=True)
    assert same(state, whole)
    assert [report.step for report in reports] == [7, 8]
    assert result.steps == 8


def test_only_the_two_newest_checkpoints_are_kept(run, tmp_path):
    run(tmp_path, epochs=2, save_every=1)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-000007", "step-000008"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (999999, 1000000, 5):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        (folder / "state.json").touch()
        (folder / "state.safetensors").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.5}, "lr was 0.01, and is 0.5 now"),
        ({"epochs": 3}, "epochs was 2, and is 3 now"),
        ({"method": trimtab.LoRA(rank=2, alpha=8)}, "method was .*'alpha': 4.*'alpha': 8"),
        ({"examples": make_examples(10, seed=1)}, "training data was '10 examples, .* now"),
    ],
    ids=["lr", "epochs", "alpha", "data"],
)
def test_another_run_is_not_resumed(run, stopped, tmp_path, change, named):
    with pytest.raises(stopped):
        run(tmp_path, stop=5, **SETTINGS)
    with pytest.raises(UsageError, match=named):
        run(tmp_path, resume=True, **{**SETTINGS, **change})


@pytest.mark.parametrize("stop", [3, 5], ids=["before-the-switch", "after-the-switch"])
def test_a_run_goes_on_on_its_own_base_alone(run, stopped, tmp_path, stop):
    method = trimtab.Dash(rank=2, directions=3, warm_up_steps=3)
    with pytest.raises(stopped):
        run(tmp_path, stop=stop, method=method, **SETTINGS)
    with pytest.raises(UsageError, match=r"the base is another one: 'model\.layers\.\S+' has other weights"):
        run(tmp_path, resume=True, method=method, llama=make_llama(1), **SETTINGS)
    run(tmp_path, resume=True, method=method, **SETTINGS)


def rewrite_base(checkpoint, change):
    file = checkpoint / "state.json"
    figures = json.loads(file.read_text())
    change(figures["run"])
    file.write_text(json.dumps(figures))


def test_a_checkpoint_that_does_not_know_its_base_is_resumed(run, stopped, tmp_path):
    with pytest.raises(stopped):
        run(tmp_path, stop=5, **SETTINGS)
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    rewrite_base(newest, lambda run: run.update(base={"model.layers.0.self_attn.q_proj": "none"}))
    with pytest.raises(FormatError, match="is not a checkpoint of this version"):
        run(tmp_path, resume=True, **SETTINGS)
    rewrite_base(newest, lambda run: run.pop("base"))
    assert run(tmp_path, resume=True, **SETTINGS)[2][0].step == 5


def test_a_new_run_does_not_mix_with_an_older_ones_checkpoints(run, stopped, tmp_path):
    with pytest.raises(stopped):
        run(tmp_path, stop=5, **SETTINGS)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="holds another run: resume it, or choose another folder"):
        run(tmp_path, **SETTINGS)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_resuming_needs_a_folder_and_something_in_it(run, tmp_path):
    with pytest.raises(UsageError, match="resume needs the run folder"):
        run(resume=True)
    run(tmp_path)
    with pytest.raises(UsageError, match="holds an adapter but no checkpoint"):
        run(tmp_path, resume=True)


def test_a_run_that_wrote_no_checkpoint_yet_starts_anew(run, same, tmp_path):
    whole, _, _ = run()
    state, _, reports = run(tmp_path, resume=True)
    assert same(state, whole)
    assert reports[0].step == 1


def test_a_finished_run_resumed_is_the_same_run(run, tmp_path):
    run(tmp_path, **SETTINGS)
    before, rows = weights(tmp_path), metrics(tmp_path)
    run(tmp_path, resume=True, **SETTINGS)
    assert weights(tmp_path) == before
    assert metrics(tmp_path) == rows


def test_a_damaged_checkpoint_is_named(run, stopped, tmp_path):
    with pytest.raises(stopped):
        run(tmp_path, stop=5, **SETTINGS)
    file = checkpoints(tmp_path / "checkpoints")[-1] / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    told = r"step-000004/state\.safetensors is not a whole .*step-000002 before it is whole: delete .*step-000004, and"
    with pytest.raises(FormatError, match=told):
        run(tmp_path, resume=True, **SETTINGS)
    older = checkpoints(tmp_path / "checkpoints")[0] / "state.json"
    kept = older.read_text()
    older.write_text("{}")
    with pytest.raises(FormatError, match="No other checkpoint is whole: start anew in another folder"):
        run(tmp_path, resume=True, **SETTINGS)
    older.write_text(kept)
    shutil.rmtree(file.parent)
    assert run(tmp_path, resume=True, **SETTINGS)[2][0].step == 3  # what the message says to do, works


def test_metrics_cut_short_in_a_line_are_mended(run, stopped, tmp_path):
    run(tmp_path / "whole", **SETTINGS)
    with pytest.raises(stopped):
        run(tmp_path / "cut", stop=5, **SETTINGS)
    file = tmp_path / "cut" / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    run(tmp_path / "cut", resume=True, **SETTINGS)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_checkpoint_never_replaces_a_foreign_folder(run, tmp_path):
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000002" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="is something else"):
        run(tmp_path, **SETTINGS)
    assert (tmp_path / "checkpoints" / "step-000002" / "diary.txt").read_text() == "mine"


def train_in_a_fork(out, resume):
    """Start a training run in a copy of this process; its process object."""

    def work():
        torch.set_num_threads(1)
        adapter = trimtab.attach(make_llama(), DROPOUT, seed=5)
        settings = Settings(batch_size=3, epochs=16, save_every=1, eval_every=3, keep_best=True, seed=5, lr=0.05)
        trimtab.fit(adapter, make_examples(), settings, eval_examples=make_examples(3, seed=8), out=out, resume=resume)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_run_killed_at_random_moments_ends_bit_for_bit_the_same(tmp_path):
    # A checkpoint is written after every step, so about half of the kills fall into the writing.
    started = time.perf_counter()
    whole = train_in_a_fork(tmp_path / "whole", resume=False)
    whole.join()
    seconds = time.perf_counter() - started
    assert whole.exitcode == 0
    draw, killed = random.Random(3), 0
    for attempt in range(12):
        process = train_in_a_fork(tmp_path / "cut", resume=attempt > 0)
        process.join(draw.uniform(0.02, 0.3) * seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        for checkpoint in checkpoints(tmp_path / "cut" / "checkpoints"):
            assert json.loads((checkpoint / "state.json").read_text())["progress"]["step"] > 0
    last = train_in_a_fork(tmp_path / "cut", resume=True)
    last.join()
    assert last.exitcode == 0
    assert killed >= 3
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    left = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert sorted(left) == ["step-000063", "step-000064"]


@pytest.mark.parametrize("moment", ["write_tensors", "fsync", "rename"])
def test_a_kill_within_saving_leaves_the_checkpoint_before_it(run, same, tmp_path, monkeypatch, moment):
    """Everything after a moment of the second save never happens, as when the process is killed there."""

    class Killed(BaseException):
        pass

    calls = {"saves": 0}
    real = save_checkpoint

    def counted(*args, **kwargs):
        calls["saves"] += 1
        if calls["saves"] == 2:
            target, name = {
                "write_tensors": ("trimtab.train.checkpoint", "write_tensors"),
                "fsync": ("os", "fsync"),
                "rename": ("os", "rename"),
            }[moment]
            monkeypatch.setattr(f"{target}.{name}", killed)
            monkeypatch.setattr("shutil.rmtree", lambda *a, **k: None)  # a dead process tidies nothing up
        return real(*args, **kwargs)

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr("trimtab.train.loop.save_checkpoint", counted)
    with pytest.raises(Killed):
        run(tmp_path, method=DROPOUT, **SETTINGS)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-000002"]
    assert any(path.name.endswith(".partial") for path in (tmp_path / "checkpoints").iterdir())
    state, _, reports = run(tmp_path, method=DROPOUT, resume=True, **SETTINGS)
    whole, _, _ = run(method=DROPOUT, **{**SETTINGS, "save_every": None})
    assert reports[0].step == 3
    assert same(state, whole)
    assert not any(path.name.startswith(".") for path in (tmp_path / "checkpoints").iterdir())


def test_ctrl_c_ends_the_step_and_writes_a_checkpoint(run, same, tmp_path, monkeypatch):
    whole, _, _ = run(method=DROPOUT, epochs=2)
    adapter = trimtab.attach(make_llama(), DROPOUT, seed=5)
    settings = Settings(batch_size=3, lr=1e-2, seed=5, epochs=2)
    monkeypatch.setattr(signal, "default_int_handler", signal.getsignal(signal.SIGINT))

    def press(report):
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trimtab.fit(adapter, make_examples(), settings, out=tmp_path, on_step=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-000003"]
    state, _, reports = run(tmp_path, method=DROPOUT, epochs=2, resume=True)
    assert reports[0].step == 4
    assert same(state, whole)


def test_a_long_run_saves_itself_without_being_told(run, tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.train.loop.AUTOSAVE_SECONDS", 0.0)
    run(tmp_path / "often")
    assert len(checkpoints(tmp_path / "often" / "checkpoints")) == 2
    monkeypatch.setattr("trimtab.train.loop.AUTOSAVE_SECONDS", 1e9)
    run(tmp_path / "never")
    assert checkpoints(tmp_path / "never" / "checkpoints") == []


def test_copies_that_are_laid_out_otherwise_resume_alike(stopped, same, tmp_path):
    """A checkpoint keeps moments contiguous; a trained copy of a transposed weight is not."""

    def trained(out, stop=None, resume=False):
        model = make_llama()
        weight = model.lm_head.weight
        weight.data = weight.data.T.contiguous().T
        adapter = trimtab.attach(model, trimtab.LoRA(rank=2), extra_modules=["lm_head"], seed=5)
        assert not all(parameter.is_contiguous() for parameter in adapter.parameters())

        def on_step(report):
            if report.step == stop:
                raise stopped

        options = Settings(batch_size=3, lr=1e-2, seed=5, epochs=2, save_every=2)
        trimtab.fit(adapter, make_examples(), options, out=out, resume=resume, on_step=on_step)
        return {key: tensor.clone() for key, tensor in adapter.state_dict().items()}

    whole = trained(tmp_path / "whole")
    with pytest.raises(stopped):
        trained(tmp_path / "cut", stop=3)
    assert same(trained(tmp_path / "cut", resume=True), whole)
