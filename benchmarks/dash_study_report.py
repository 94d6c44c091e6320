"""What the runs of dash_study.py come to: a table, paired differences, verdicts, and a plot.

usage: python benchmarks/dash_study_report.py [FILE ...] [--plot docs/images/dash_study.svg]

FILE: benchmarks/results/dash_study.jsonl, or the files of processes that shared the arms.

Accuracy is the mean over the tasks of the share of right answers; beside it stands how likely the right answers are
found, which tells smaller differences. Intervals are 95 % bootstrap intervals that resample
the seeds and, within each task, the questions; the two arms of a difference are resampled alike. Of few seeds a
bootstrap knows too little: what it calls better holds for seeds like these, and an interval is rather too narrow.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dash_study import ARMS, BARE, RATES, TASKS, TUNING_SEED, Sizes, chosen_rate, stored
from numpy.typing import NDArray

DRAWS = 4000
PAIRS = (
    ("LoRA r=2", BARE),
    ("Dash r=2", "LoRA r=2"),
    ("Dash r=16", "LoRA r=16"),
    ("Dash r=2", "LoRA r=16"),
    ("LoRA r=2", "LoRA r=16"),
    ("Dash r=2", "Dash r=2, random"),
    ("Dash r=2", "Dash r=2, smallest σ"),
    ("Dash r=2, d at 10 × the rate", "LoRA r=2"),
)
"""The differences that are asked for, first minus second."""

OUTCOMES = {"answers": ("accuracy", 3, True), "nats": ("nats a byte of the right answer", 4, False)}
"""What is told of the test questions: its name, decimals, and whether more of it is better."""
Scores = list[NDArray[np.float64]]
"""Of one arm: [seeds, questions] of each task."""


def scores_of(runs: Sequence[dict[str, Any]], arm: str, outcome: str) -> Scores:
    """An outcome of an arm's runs at its rate, seeds in order; the bare model's one run serves every seed.

    Of the seeds that every arm was tested with that was tested at all.
    """
    if arm == BARE:
        own = [run for run in runs if run["arm"] == BARE]
    else:
        tested = {each: at_its_rate(runs, each) for each in ARMS}
        seeds = [{run["seed"] for run in those} for those in tested.values() if those]
        own = [run for run in tested[arm] if all(run["seed"] in each for each in seeds)]
        own.sort(key=lambda run: run["seed"])
    return [np.array([run[outcome][task] for run in own if run.get(outcome)], dtype=float) for task in TASKS]


def at_its_rate(runs: Sequence[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """An arm's tested runs at the rate that was chosen for it; none while a rate has not been tried."""
    if {run["lr"] for run in runs if run["arm"] == arm and run.get("seed") == TUNING_SEED} != set(RATES):
        return []
    rate = chosen_rate(runs, arm)
    return [run for run in runs if run["arm"] == arm and run["lr"] == rate and "answers" in run]


def draws_of(arms: Sequence[Scores]) -> NDArray[np.float64]:
    """The mean score of each arm in resamples that all arms share, [arms, DRAWS]."""
    random = np.random.default_rng(0)
    seeds = max(len(arm[0]) for arm in arms)
    picked = random.integers(0, seeds, (DRAWS, seeds))
    means = np.zeros((len(arms), DRAWS))
    for task in range(len(TASKS)):
        count = arms[0][task].shape[1]
        questions = random.integers(0, count, (DRAWS, count))
        for number, arm in enumerate(arms):
            rows = arm[task] if len(arm[task]) == seeds else np.repeat(arm[task], seeds, 0)
            by_seed = np.stack([rows[:, chosen].mean(1) for chosen in questions])  # [DRAWS, seeds]
            means[number] += np.take_along_axis(by_seed, picked, 1).mean(1) / len(TASKS)
    return means


def mean_of(scores: Scores) -> float:
    return float(np.mean([task.mean() for task in scores]))


def alike(first: Scores, second: Scores) -> float:
    """The share of questions that two arms answer both rightly or both wrongly, seed by seed."""
    return mean_of([one == other for one, other in zip(first, second, strict=True)])


def chance_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What guessing answers rightly, by task; it stands in the bare model's line."""
    return next((run["chance"] for run in runs if "chance" in run), {})


def verdict(low: float, high: float, more_is_better: bool) -> str:
    """What a difference's interval allows to say."""
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) == more_is_better else "worse"


Found = dict[str, tuple[float, float, float]]
"""(mean, low, high) of each arm, or of each difference."""


def tables(runs: Sequence[dict[str, Any]], outcome: str) -> tuple[str, Found, Found]:
    """Arms and differences in Markdown, and their figures. Empty where no run has the outcome."""
    name, decimals, more_is_better = OUTCOMES[outcome]
    arms = {arm: scores_of(runs, arm, outcome) for arm in (BARE, *ARMS)}
    arms = {arm: scores for arm, scores in arms.items() if len(scores[0])}
    if not arms:
        return "", {}, {}
    means = dict(zip(arms, draws_of(list(arms.values())), strict=True))
    lines = [f"| arm | parameters | rate | {name} | 95 % interval | " + " | ".join(TASKS) + " |"]
    lines.append("|---" * (5 + len(TASKS)) + "|")
    found = {}
    for arm, scores in arms.items():
        parameters = next(r["parameters"] for r in runs if r["arm"] == arm)
        rate = f"{chosen_rate(runs, arm):g}" if arm != BARE else ""
        each = " | ".join(f"{task.mean():.{decimals}f}" for task in scores)
        low, high = np.quantile(means[arm], [0.025, 0.975])
        figures = f"{mean_of(scores):.{decimals}f} | {low:.{decimals}f} to {high:.{decimals}f}"
        lines.append(f"| {arm} | {parameters:,} | {rate} | {figures} | {each} |")
        found[arm] = (mean_of(scores), float(low), float(high))
    guessed = chance_of(runs) if outcome == "answers" else {}
    if guessed:
        each = " | ".join(f"{guessed[task]:.{decimals}f}" for task in TASKS)
        lines.append(f"| guessing | | | {np.mean(list(guessed.values())):.{decimals}f} | | {each} |")
    differences = {}
    told = "| answered alike |" if outcome == "answers" else "|"
    lines += ["", f"| difference | {name} | 95 % interval | {told}", "|---" * (told.count("|") + 3) + "|"]
    for first, second in (pair for pair in PAIRS if set(pair) <= set(arms)):
        low, high = np.quantile(means[first] - means[second], [0.025, 0.975])
        difference = f"{mean_of(arms[first]) - mean_of(arms[second]):+.{decimals}f}"
        interval = f"{low:+.{decimals}f} to {high:+.{decimals}f}"
        said = verdict(low, high, more_is_better)
        said += f" | {alike(arms[first], arms[second]):.1%}" if outcome == "answers" else ""
        lines.append(f"| {first} − {second} | {difference} | {interval} | {said} |")
        differences[f"{first} − {second}"] = (mean_of(arms[first]) - mean_of(arms[second]), float(low), float(high))
    return "\n".join(lines), found, differences


def tuning(runs: Sequence[dict[str, Any]]) -> str:
    """The held-out loss of every arm at every rate, in Markdown."""
    lines = ["| arm | " + " | ".join(f"{rate:g}" for rate in RATES) + " |", "|---" * (1 + len(RATES)) + "|"]
    for arm in ARMS:
        losses = {r["lr"]: r["held_out_loss"] for r in runs if r["arm"] == arm and r.get("seed") == TUNING_SEED}
        lines.append(f"| {arm} | " + " | ".join(f"{losses[r]:.4f}" if r in losses else "" for r in RATES) + " |")
    return "\n".join(lines)


def plot(arms: Found, differences: Found, guessed: float | None, path: Path) -> None:
    """Accuracy of each arm beside guessing, and the differences beside none, with their intervals."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "dash_study"  # the same runs give the same file
    figure = Figure(figsize=(7.5, 1.2 + 0.36 * (len(arms) + len(differences))), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[len(arms), max(1, len(differences))])
    for axes, found, null, label in (
        (upper, arms, guessed, "accuracy, mean of four tasks; 95 % interval; dashed: guessing"),
        (lower, differences, 0.0, "difference of accuracy; 95 % interval"),
    ):
        for row, (name, (mean, low, high)) in enumerate(reversed(found.items())):
            axes.plot([low, high], [row, row], color="#7a8699", linewidth=3, solid_capstyle="round")
            axes.plot(mean, row, "o", color="#1f5fbf" if name.startswith("Dash") else "#333333")
        if null is not None:
            axes.axvline(null, color="#333333", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(found)), list(reversed(found)))
        axes.set_xlabel(label)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def edges(runs: Sequence[dict[str, Any]]) -> str:
    """A line for each arm whose best rate is the lowest or the highest tried: a better one may lie beyond."""
    tested = [arm for arm in ARMS if at_its_rate(runs, arm)]
    at_end = [arm for arm in tested if chosen_rate(runs, arm) in (min(RATES), max(RATES))]
    return "\n".join(f"The best rate of {arm} is at an end of those tried." for arm in at_end)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", default=[here / "results" / "dash_study.jsonl"])
    parser.add_argument("--plot", type=Path, default=here.parent / "docs" / "images" / "dash_study.svg")
    asked = parser.parse_args()
    lines = {json.dumps(run, sort_keys=True): run for path in asked.results for run in stored(path, {})}
    runs = list(lines.values())
    settings = {tuple((key, r[key]) for key in ("model", "threads", *vars(Sizes()))) for r in runs}
    if len(settings) > 1:
        parser.error(f"there are runs of {len(settings)} models or sizes: {settings}")
    print(f"Held-out loss by rate:\n\n{tuning(runs)}\n{edges(runs)}")
    found = {outcome: tables(runs, outcome) for outcome in OUTCOMES}
    print("\n\n".join(table for table, *_ in found.values() if table))
    guessed = chance_of(runs)
    if found["answers"][1]:
        plot(*found["answers"][1:], float(np.mean(list(guessed.values()))) if guessed else None, asked.plot)


if __name__ == "__main__":
    main()
