"""Fine-tuning side by side: trimtab, and PEFT with the transformers Trainer, step by step in turn, on the same batches.

usage: python benchmarks/finetune.py --model DIR --data FILE [--eval-data FILE] [--seeds 0 1 2] [--threads 1]
    [--out benchmarks/results/finetune.jsonl] [further flags of finetune_side.py]

Each side of a seed is a process of its own, and one computes while the other waits. A side's run is one line of the
file; a seed whose lines stand there already is not run again, so an interrupted benchmark goes on where it stopped.
Prints medians, extremes and ratios of everything in the file that was run with the same flags.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_side import about, flags

from trimtab.files import whole_lines

HERE = Path(__file__).parent
SIDES = ("trimtab", "peft")
DONE = "done\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "finetune.jsonl")
    asked, rest = parser.parse_known_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    wanted = about(flags(side_flags(SIDES[0], 0, asked, rest)))
    del wanted["side"], wanted["seed"]
    for seed in asked.seeds:
        if not any({**wanted, "seed": seed}.items() <= run.items() for run in stored(asked.out)):
            # Which side begins changes from seed to seed.
            lines = in_turn(SIDES if seed % 2 == 0 else SIDES[::-1], seed, asked, rest)
            with asked.out.open("a") as file:
                file.write("".join(lines))
            print("".join(lines), end="", flush=True)
    report([run for run in stored(asked.out) if wanted.items() <= run.items()])


def in_turn(sides: Sequence[str], seed: int, asked: argparse.Namespace, rest: list[str]) -> list[str]:
    """Both sides of a seed, a step of each in turn. Returns the line of results of each."""
    running = {side: started(side, seed, asked, rest) for side in sides}
    results: dict[str, str] = {}
    for process in running.values():
        answer(process)  # its model is loaded
    while len(results) < len(sides):
        for side, process in running.items():
            if side not in results:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                line = answer(process)
                if line != DONE:
                    results[side] = line
    return [results[side] for side in sides]


def started(side: str, seed: int, asked: argparse.Namespace, rest: list[str]) -> subprocess.Popen[str]:
    """The process of one side, which waits for its turns."""
    command = [sys.executable, str(HERE / "finetune_side.py"), *side_flags(side, seed, asked, rest)]
    # Threads that spin while they wait cost both sides on shared cores: both wait shortly.
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def side_flags(side: str, seed: int, asked: argparse.Namespace, rest: list[str]) -> list[str]:
    """What finetune_side.py is given."""
    own = ["--model", asked.model, "--data", str(asked.data), "--seed", str(seed), "--threads", str(asked.threads)]
    return [side, *own, "--turns", *rest]


def answer(process: subprocess.Popen[str]) -> str:
    """DONE after a step, or the line of results; what else a library prints is passed over."""
    assert process.stdout is not None
    for line in process.stdout:
        if line == DONE or line.startswith('{"side"'):
            return line
    sys.exit(f"a side ended with {process.wait()}")


def stored(path: Path) -> list[dict[str, Any]]:
    """The runs there are."""
    return [line for _, line in whole_lines(path)]


def report(runs: list[dict[str, Any]]) -> None:
    """Medians and extremes of both sides, and the ratio of the medians."""
    for key, scale, unit in (
        ("tokens_per_second", 1.0, "real tokens/s"),
        ("memory_bytes", 2.0**30, "GiB above the model"),
        ("held_out_loss", 1.0, "nats/token held out"),
    ):
        medians = {}
        for side in ("trimtab", "peft"):
            values = [float(r[key]) / scale for r in runs if r["side"] == side and r[key] is not None]
            if not values:
                continue
            medians[side] = statistics.median(values)
            told = f"{medians[side]:.3f} [{min(values):.3f}, {max(values):.3f}]"
            print(f"{side:8} {unit:22} {told} ({len(values)} runs)")
        if len(medians) == 2:
            print(f"trimtab / peft {unit}: {medians['trimtab'] / medians['peft']:.3f}")
    ratios = sorted(ratio for pair in paired(runs) for ratio in pair)
    if len(ratios) > 1:
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"peft / trimtab seconds, step by step: {middle:.3f} [{low:.3f}, {high:.3f}], {len(ratios)} steps")


def paired(runs: list[dict[str, Any]]) -> list[list[float]]:
    """For each seed, PEFT's seconds over trimtab's, step by step, the first left out: things are set up in it."""
    sides = [
        {r["seed"]: r["step_seconds"] for r in runs if r["side"] == side and "step_seconds" in r} for side in SIDES
    ]
    return [
        [p / t for t, p in zip(ours[1:], sides[1][seed][1:], strict=True)]
        for seed, ours in sides[0].items()
        if seed in sides[1]
    ]


if __name__ == "__main__":
    main()
