"""How often the interval of an intrinsic dimension holds it: whole searches on curves whose dimension is known.

usage: python benchmarks/dimension_coverage.py [--searches 200] [--out benchmarks/results/dimension_coverage.json]

A search is the one of `trimtab measure dimension`, but a run is a draw: the accuracy that a curve has at d, plus noise
of a seed, and of the baseline likewise. smooth: logistic in log d, accuracy 0.5 to 0.97; steep: the same, sixteen times
as fast; step: 0.5 below the dimension and 0.97 from there on. Where the dimension is, is drawn for each search, between
30 and 3,000 of 100,000. noise own: every run has its own; shared: a seed has one for all d, as when some starts are
better.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.files import write_whole
from trimtab.subspace.crossing import LEVEL, Threshold
from trimtab.subspace.judged import Judged
from trimtab.subspace.plan import Plan
from trimtab.subspace.runs import Run, Runs
from trimtab.subspace.search import measure
from trimtab.subspace.training import Outcome

D, BASELINE, CHANCE, SHARE = 100_000, 0.97, 0.5, 0.9
NOISE, BASELINE_NOISE = 0.01, 0.005
STEEPNESS = {"smooth": 1.5, "steep": 24.0, "step": math.inf}
SEEDS = (3, 5, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dimension_coverage.json")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for curve in STEEPNESS:
        for noise in ("own", "shared"):
            for seeds in SEEDS:
                rows.append(case(curve, noise, seeds, asked.searches))
                print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    about = {"searches": asked.searches, "level": LEVEL, "noise": NOISE, "baseline_noise": BASELINE_NOISE}
    write_whole(asked.out, json.dumps({**about, "rows": rows}, indent=1) + "\n")


def case(curve: str, noise: str, seeds: int, searches: int) -> dict[str, Any]:
    """Of so many searches: how many intervals hold the dimension, and how wide they are in the middle."""
    held, ratios = 0, []
    for number in range(searches):
        random = np.random.default_rng([number, seeds])
        true = float(np.exp(random.uniform(math.log(30), math.log(3000))))
        runs = Runs(functools.partial(trainer, true, STEEPNESS[curve], noise, random), {})
        plan = Plan(seeds=seeds, threshold=Threshold("local", SHARE))
        found = measure(runs, D, plan, scored=Judged("test", CHANCE, 10_000)).crossing
        held += found.low <= math.ceil(true) <= found.high
        ratios.append(found.high / found.low if found.low else math.inf)
    median = float(np.median(ratios))
    return {"curve": curve, "noise": noise, "seeds": seeds, "held": held / searches, "high_by_low": round(median, 3)}


def trainer(true: float, steepness: float, noise: str, random: np.random.Generator) -> Any:
    shared: dict[int, float] = {}

    def train(run: Run) -> Outcome:
        own = float(random.normal(0, BASELINE_NOISE if run.d is None else NOISE))
        off = own if noise == "own" or run.d is None else shared.setdefault(run.seed, own)
        score = min(max(accuracy(run.d, true, steepness) + off, 0.0), 1.0)
        d = D if run.d is None else run.d
        return Outcome(run.seed, d, run.lr, score, score, score, 1.0, 0.1, 0.0, 1, diverged=False)

    return train


def accuracy(d: int | None, true: float, steepness: float) -> float:
    """The curve's: SHARE of BASELINE at `true`."""
    if d is None or d == 0:
        return BASELINE if d is None else CHANCE
    if math.isinf(steepness):
        return BASELINE if d >= true else CHANCE
    at = (SHARE * BASELINE - CHANCE) / (BASELINE - CHANCE)
    x = steepness * math.log(d / true) + math.log(at / (1 - at))
    return CHANCE + (BASELINE - CHANCE) / (1 + math.exp(-x)) if x > -700 else CHANCE


if __name__ == "__main__":
    main()
