"""Realistic run folders, made from a seed."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

CONFIG = """\
model: smollm2-135m-instruct
data: names.jsonl   # train split
method: lora
rank: 16
alpha: 32
targets: all-linear
lr: 2.0e-4
schedule: cosine
max-steps: 120
batch-size: 16
max-length: 1024
dtype: float32
seed: 0
"""
KINDS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def metrics(steps: int = 120) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.417}]
    for step in range(1, steps + 1):
        rate = 2e-4 * min(step / 8, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)
        row = {
            "step": step,
            "epoch": step / steps,
            "loss": 1.35 + 2.0 * math.exp(-step / 18) + rng.gauss(0, 0.13),
            "lr": rate,
            "grad_norm": 0.6 + 1.8 * math.exp(-step / 12) + abs(rng.gauss(0, 0.15)),
            "real_tokens": 3211 * step,
            "supervised_tokens": 118 * step,
            "seconds": 2.9 * step,
        }
        if step % 30 == 0:
            row["eval_loss"] = 1.42 + 1.9 * math.exp(-step / 20)
        rows.append(row)
    return rows


def layers(number: int = 30) -> list[dict[str, Any]]:
    rng = random.Random(1)
    rows = []
    for layer in range(number):
        for block, kinds in KINDS.items():
            for place, kind in enumerate(kinds):
                size = 0.004 + 0.006 * layer / number + (0.004 if kind in ("v_proj", "o_proj") else 0.0005 * place)
                change = size * math.exp(rng.gauss(0, 0.18))
                rows.append(
                    {
                        "name": f"model.layers.{layer}.{block}.{kind}",
                        "relative_change": change,
                        "unchanged_share": rng.uniform(0.0001, 0.002),
                        "realised_share": 1 + rng.gauss(0, 1e-5),
                        "error_share": rng.uniform(2e-6, 9e-6),
                    }
                )
    return rows


SAMPLES = [
    {
        "prompt": "Name this function:\n\ndef f(path):\n    with open(path, 'rb') as file:\n"
        "        return hashlib.sha256(file.read()).hexdigest()",
        "expected": "file_digest",
        "before": "The function `f` takes a path and returns the hash of the file at that path as text.",
        "after": "file_digest",
    },
    {
        "prompt": "Name this function:\n\ndef f(self, tag, attrs):\n    self.rawdata = ''\n    self.lasttag = '???'\n"
        "    self.interesting = interesting_normal\n    self.cdata_elem = None\n    super().reset()",
        "expected": "reset",
        "before": "def f(self, tag, attrs):",
        "after": "reset_data",
    },
    {
        "prompt": "Name this function:\n\ndef f(x):\n    return x == '<script>alert(1)</script>'",
        "expected": "is_script",
        "before": "",
        "after": "<script>alert(1)</script><img src=x onerror=alert(2)>",
    },
]
RESULT = {
    "seconds": 372.4,
    "real_tokens": 385320,
    "supervised_tokens": 14160,
    "tokens_per_second": 1034.7,
    "train_loss": 1.342,
    "eval_loss": 1.4247,
    "peak_rss_bytes": 2214592512,
    "trainable_parameters": 4884480,
    "base_parameters": 134515008,
    "model": "smollm2-135m-instruct",
    "method": {"name": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.0},
    "adapter": "runs/demo/adapter",
    "merged": "runs/demo/merged",
    "versions": {"trimtab": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
    "threads": 2,
    "dtype": "float32",
    "subtoken_f1": {
        "before": 0.021,
        "after": 0.243,
        "interval_before": [0.012, 0.032],
        "interval_after": [0.206, 0.281],
        "resampled": "whole modules",
        "resampled_number": 37,
    },
    "exact_match": {
        "before": 0.0,
        "after": 0.092,
        "interval_before": [0, 0.0],
        "interval_after": [0.063, 0.125],
        "resampled": "whole modules",
        "resampled_number": 37,
    },
    "knowledge": {
        "before": 0.525,
        "after": 0.5125,
        "interval_before": [0.4125, 0.6375],
        "interval_after": [0.4, 0.625],
        "chance": 0.25,
        "questions": 80,
        "resampled": "questions",
        "resampled_number": 80,
    },
}


def audit(number: int = 30) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "layers": layers(number),
        "max_logit_difference": 3.81e-5,
        "greedy_agreement": 1.0,
        "probe_positions": 87,
        "probe_kind": "8 prompts",
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(path: Path) -> Path:
    """A finished, merged run of the demo."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    write_lines(path / "metrics.jsonl", metrics())
    write_lines(path / "samples.jsonl", SAMPLES)
    (path / "result.json").write_text(json.dumps(RESULT), encoding="utf-8")
    (path / "audit.json").write_text(json.dumps(audit()), encoding="utf-8")
    return path
