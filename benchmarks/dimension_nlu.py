"""How many directions MiniLM needs for SST-2 and MRPC: DID, SAID, and the same net with random weights as the control.

usage: python benchmarks/dimension_nlu.py --data DIR [--only sst2-did ...] [--out benchmarks/results/dimension_nlu]
    [flags of trimtab measure dimension ...]

--data: the folder that holds nlu/. Each measurement is a `trimtab measure dimension` in a folder of its own, and one
that was stopped goes on where it was. SETTINGS are of a task, the same for all three. The learning rate is the best of
three by the validation split: of all parameters, and in subspaces at the first d where anything is learned, whose
multiple of lr √(D/d) every later d is given. The control has a choice at every d, so that it cannot be said that it
learned nothing for want of the right rate. A baseline that is not clear of chance ends its measurement with the reason,
and the next one follows. MRPC has batches of 16, and so twice the steps: with batches of 32 0.9 of the baseline, 0.761
after three epochs, is no further from chance, 0.665, than guessing on as many rows strays from it. Its threshold is
0.03 above chance and known to about ± 0.03 from three baselines, so that d are not tried nearer than by a factor of 4.

0.9 of its own baseline is easier to reach for a net that learns less, so what was measured of a task is measured again
with one threshold for all, 0.9 of the lowest of their baselines, in the folder TASK-common; few runs are new then, and
they are compared there. SAID takes the runs of all parameters that DID trained: they are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trimtab.cli import measure_dimension
from trimtab.files import read_json
from trimtab.subspace.judged import NoDimension

SETTINGS = {
    "sst2": ("--rows", "1500", "--test-rows", "1800", "--epochs", "3", "--resolution", "2"),
    "mrpc": ("--rows", "3200", "--test-rows", "1725", "--epochs", "3", "--batch-size", "16", "--resolution", "4"),
}
KINDS = {
    "did": ("--rates-at", "first"),
    "said": ("--mode", "said", "--rates-at", "first"),
    "random": ("--random-weights", "--rates-at", "each"),
}
MEASUREMENTS = {f"{task}-{kind}": (task, kind) for task in SETTINGS for kind in KINDS}
SAME = ("--model", "minilm", "--rates", "1,4,16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dimension_nlu")
    asked, passed_on = parser.parse_known_args()
    for name in asked.only:
        task, kind = MEASUREMENTS[name]
        like = asked.out / f"{task}-did"
        taken = ["--reuse", str(like)] if kind == "said" and (like / "search.json").exists() else []
        measured(name, [*flags_of(name, asked.data), *taken, "--out", str(asked.out / name), *passed_on])
    for task in dict.fromkeys(MEASUREMENTS[name][0] for name in asked.only):
        in_common(task, asked.data, asked.out, passed_on)


def flags_of(name: str, data: str) -> list[str]:
    task, kind = MEASUREMENTS[name]
    return [*SAME, "--task", task, "--data-dir", data, *SETTINGS[task], *KINDS[kind]]


def measured(name: str, flags: Sequence[str]) -> bool:
    """Whether there is a dimension to find; where there is none, the reason is printed. Other errors are raised."""
    try:
        measure_dimension.run("measure dimension", "", list(flags))
    except NoDimension as error:
        print(f"{name} is not measured: {error}", flush=True)
        return False
    return True


def in_common(task: str, data: str, out: Path, passed_on: Sequence[str]) -> None:
    """What was measured of a task once more, with one threshold for all, and side by side."""
    own = {kind: out / f"{task}-{kind}" for kind in KINDS if (out / f"{task}-{kind}" / "results.json").exists()}
    if len(own) < 2:
        return
    baselines = [read_json(folder / "results.json")["baseline"] for folder in own.values()]
    lowest = min(sum(scores) / len(scores) for scores in baselines)
    threshold = ["--threshold", "absolute", "--share", f"{0.9 * lowest:.4f}"]
    common = out / f"{task}-common"
    found = []
    for kind, folder in own.items():
        flags = [*flags_of(f"{task}-{kind}", data), *threshold, "--reuse", str(folder), "--out", str(common / kind)]
        if measured(f"{task}-{kind}", [*flags, *passed_on]):
            found.append(str(common / kind))
    if len(found) > 1:
        measure_dimension.run("measure dimension", "", ["--compare", *found, "--out", str(common)])


if __name__ == "__main__":
    main()
