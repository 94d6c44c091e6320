"""What the tests of the command line share besides fixtures."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trimtab.tasks.results import Results

ROOT = Path(__file__).parents[2]


def rows(start, stop):
    return [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(start, stop)]


def write_rows(path, items):
    path.write_text("".join(json.dumps(row) + "\n" for row in items), encoding="utf-8")
    return path


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def weights(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def stopped_after_two_batches(monkeypatch):
    """Ctrl-C comes when the second batch of an evaluation has been kept. Gives the sizes of the batches kept."""
    add, calls = Results.add, []

    def stopping(self, task, outcomes):
        add(self, task, outcomes)
        calls.append(len(outcomes))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Results, "add", stopping)
    return calls
