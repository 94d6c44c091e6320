"""Fine-tuning side by side: trimtab, and PEFT with the transformers Trainer, in turn, on the same batches.

usage: python benchmarks/finetune.py --model DIR --data FILE [--eval-data FILE] [--seeds 0 1 2] [--threads 1]
    [--out benchmarks/results/finetune.jsonl] [further flags of finetune_side.py]

Each run is a process of its own and one line of the file; a run that stands there already is not run again, so an
interrupted benchmark goes on where it stopped. Prints medians, extremes and ratios of everything in the file that has
the same data and threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "finetune.jsonl")
    asked, rest = parser.parse_known_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds:
        sides = ("trimtab", "peft") if seed % 2 == 0 else ("peft", "trimtab")
        for side in sides:
            wanted = {"side": side, "data": asked.data.name, "seed": seed, "threads": asked.threads}
            if not any(wanted.items() <= run.items() for run in stored(asked.out)):
                run(side, seed, asked, rest)
    report([r for r in stored(asked.out) if (r["data"], r["threads"]) == (asked.data.name, asked.threads)])


def run(side: str, seed: int, asked: argparse.Namespace, rest: list[str]) -> None:
    """One side's run, appended to the file."""
    command = [sys.executable, str(HERE / "finetune_side.py"), side, "--model", asked.model, "--data", str(asked.data)]
    command += ["--seed", str(seed), "--threads", str(asked.threads), *rest]
    # Threads that spin while they wait cost both sides on shared cores: both wait shortly.
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    line = done.stdout.strip().splitlines()[-1]
    print(line, flush=True)
    with asked.out.open("a") as file:
        file.write(line + "\n")


def stored(path: Path) -> list[dict[str, object]]:
    """The runs there are."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(runs: list[dict[str, object]]) -> None:
    """Medians and extremes of both sides, and the ratio of the medians."""
    for key, scale, unit in (
        ("tokens_per_second", 1.0, "real tokens/s"),
        ("memory_bytes", 2.0**30, "GiB above the model"),
        ("held_out_loss", 1.0, "nats/token held out"),
    ):
        medians = {}
        for side in ("trimtab", "peft"):
            values = [float(r[key]) / scale for r in runs if r["side"] == side and r[key] is not None]  # type: ignore[arg-type]
            if not values:
                continue
            medians[side] = statistics.median(values)
            told = f"{medians[side]:.3f} [{min(values):.3f}, {max(values):.3f}]"
            print(f"{side:8} {unit:22} {told} ({len(values)} runs)")
        if len(medians) == 2:
            print(f"trimtab / peft {unit}: {medians['trimtab'] / medians['peft']:.3f}")


if __name__ == "__main__":
    main()
