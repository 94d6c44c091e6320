"""How many directions MiniLM needs for SST-2 and MRPC: DID, SAID, and the same net with random weights as the control.

usage: python benchmarks/dimension_nlu.py --data DIR [--only sst2-did ...] [--out benchmarks/results/dimension_nlu]
    [flags of trimtab measure dimension ...]

--data: the folder that holds nlu/. Each measurement is a `trimtab measure dimension` in a folder of its own, and one
that was stopped goes on where it was; then all that are there are compared, in --out itself. SETTINGS are of a task,
the same for all three. At every d, and for the baseline, the learning rate is the better of two by the validation
split. A baseline that is not clear of chance ends its measurement with the reason, and the next one follows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trimtab.cli import run

SETTINGS = {
    "sst2": ("--rows", "1500", "--test-rows", "1800", "--epochs", "3"),
    "mrpc": ("--rows", "3200", "--test-rows", "1725", "--epochs", "3"),
}
KINDS = {"did": (), "said": ("--mode", "said"), "random": ("--random-weights",)}
MEASUREMENTS = {f"{task}-{kind}": (task, kind) for task in SETTINGS for kind in KINDS}
SAME = ("--model", "minilm", "--start", "500", "--resolution", "1.5", "--rates", "1,4")
NO_DIMENSION = 1  # the command's exit code where there is none to find


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dimension_nlu")
    asked, passed_on = parser.parse_known_args()
    for name in asked.only:
        task, kind = MEASUREMENTS[name]
        what = ["--task", task, "--data-dir", asked.data, "--out", str(asked.out / name)]
        code = run(["measure", "dimension", *SAME, *what, *SETTINGS[task], *KINDS[kind], *passed_on])
        if code not in (0, NO_DIMENSION):
            sys.exit(code)
    found = [str(path.parent) for path in sorted(asked.out.glob("*/results.json"))]
    if len(found) > 1:
        sys.exit(run(["measure", "dimension", "--compare", *found, "--out", str(asked.out)]))


if __name__ == "__main__":
    main()
