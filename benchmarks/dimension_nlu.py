"""How many directions MiniLM needs for SST-2 and MRPC: DID, SAID, and the same net with random weights as the control.

usage: python benchmarks/dimension_nlu.py --data DIR [--only sst2-did ...] [--out benchmarks/results/dimension_nlu]
    [flags of trimtab measure dimension ...]

--data: the folder that holds nlu/. Each measurement is a `trimtab measure dimension` in a folder of its own, and one
that was stopped goes on where it was; then all that are there are compared. SETTINGS are of a task, the same for all
three. A baseline that is not clear of chance ends its measurement, and is a result too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimtab.cli import run

SETTINGS = {
    "sst2": ("--rows", "3000", "--test-rows", "1800", "--epochs", "2"),
    "mrpc": ("--rows", "3200", "--test-rows", "1725", "--epochs", "3"),
}
KINDS = {"did": (), "said": ("--mode", "said"), "random": ("--random-weights",)}
MEASUREMENTS = {f"{task}-{kind}": (task, kind) for task in SETTINGS for kind in KINDS}
SAME = ("--model", "minilm", "--start", "500", "--resolution", "1.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dimension_nlu")
    asked, passed_on = parser.parse_known_args()
    for name in asked.only:
        task, kind = MEASUREMENTS[name]
        what = ["--task", task, "--data-dir", asked.data, "--out", str(asked.out / name)]
        run(["measure", "dimension", *SAME, *what, *SETTINGS[task], *KINDS[kind], *passed_on])
    found = [str(path.parent) for path in sorted(asked.out.glob("*/results.json"))]
    if len(found) > 1:
        run(["measure", "dimension", "--compare", *found])


if __name__ == "__main__":
    main()
