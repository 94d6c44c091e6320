"""Other loggers, through stand-ins for their libraries."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest

import trimtab
from tiny_training import make_examples, make_llama
from trimtab.errors import UsageError
from trimtab.train.metrics import LOGGERS, make_logger
from trimtab.train.settings import Settings


class Recorder:
    """Takes any call and notes it."""

    def __init__(self, calls, name=""):
        self.calls, self.name = calls, name

    def __getattr__(self, name):
        return Recorder(self.calls, f"{self.name}.{name}".lstrip("."))

    def __call__(self, *args, **kwargs):
        self.calls.append((self.name, args, kwargs))
        return self


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for the loggers' libraries; what they were called with."""
    calls = []
    for module in ("torch.utils.tensorboard", "mlflow", "wandb"):
        stand_in = types.ModuleType(module)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(module, None)  # others ask whether it is installed
        recorder = Recorder(calls)
        for name in ("SummaryWriter", "start_run", "log_metrics", "end_run", "init"):
            setattr(stand_in, name, getattr(recorder, name))
        monkeypatch.setitem(sys.modules, module, stand_in)
    return calls


@pytest.mark.parametrize(
    ("name", "log", "close"),
    [
        ("tensorboard", "SummaryWriter.add_scalar", "SummaryWriter.close"),
        ("mlflow", "log_metrics", "end_run"),
        ("wandb", "init.log", "init.finish"),
    ],
)
def test_a_logger_gets_every_step_and_is_closed(libraries, tmp_path, name, log, close):
    adapter = trimtab.attach(make_llama(), trimtab.LoRA(rank=2))
    reports = []
    trimtab.fit(
        adapter,
        make_examples(),
        Settings(batch_size=5),
        out=tmp_path,
        on_step=reports.append,
        loggers=[make_logger(name, tmp_path)],
    )
    calls = [call for call in libraries if call[0] == log]
    if name == "tensorboard":
        logged = [args[1:] for _, args, _ in calls if args[0] == "loss"]
    else:
        logged = [(args[0]["loss"], kwargs["step"]) for _, args, kwargs in calls]
    assert logged == [(report.loss, report.step) for report in reports]
    assert [call[0] for call in libraries][-1] == close


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_library_is_told_with_what_to_install(monkeypatch, tmp_path, name):
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"logging to {name} needs its library: pip install {name}"):
        make_logger(name, tmp_path)
