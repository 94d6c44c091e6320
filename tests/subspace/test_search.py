"""The search on a curve that is known, its stored runs, and what it refuses."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import made_up_trainer
import numpy as np
import pytest
from made_up_trainer import D

from trimtab.errors import FormatError, TrimtabError, UsageError
from trimtab.subspace.crossing import Threshold
from trimtab.subspace.judged import Judged, NoDimension
from trimtab.subspace.measured import Measured
from trimtab.subspace.plan import SWEEP_SEED, Plan
from trimtab.subspace.runs import Run, Runs
from trimtab.subspace.search import measure
from trimtab.subspace.training import Outcome


def runs(folder: Path | None = None, workers: int = 1, about: dict | None = None, **options) -> Runs:
    return Runs(
        functools.partial(made_up_trainer.trainer, **options), about or {"task": "made up"}, folder, workers=workers
    )


def found(own: Runs, chance: float = 0.1, least: int = 1, most: int | None = None, **plan) -> Measured:
    with closing(own):
        scored, chosen = (Judged(split, chance, 10_000) for split in ("test", "validation"))
        return measure(own, D, Plan(**plan), scored=scored, chosen=chosen, least=least, most=most)


def runs_of(score: Callable[[Run], tuple[float, float, float]], start: float = 0.1, first_loss: float = 2.0) -> Runs:
    """Runs that score what a function says, on training, validation and test split; θ0 scores `start` on each."""

    def train(run: Run) -> Outcome:
        d, scores = D if run.d is None else run.d, score(run) if run.d != 0 else (start,) * 3
        return Outcome(run.seed, d, run.lr, *scores, first_loss, 0.1, 1.0, 10, diverged=False)

    return Runs(lambda: train, {"task": "made up"})


@pytest.mark.parametrize("d90", [3.0, 40.0, 700.0, 30_000.0])
def test_the_dimension_of_a_known_curve_is_found(d90: float) -> None:
    own = found(runs(d90=d90))
    assert own.crossing.low <= own.crossing.d <= own.crossing.high
    assert own.crossing.d == pytest.approx(d90, rel=0.05, abs=1)
    assert own.crossing.low <= d90 <= own.crossing.high
    below, above = max(d for d in own.scores if d < d90), min(d for d in own.scores if d >= d90)
    assert above - below == 1 or above / below <= 1.2
    assert len(own.scores) <= 12, "few d, each with every seed"
    assert all(len(scores) == 3 for scores in own.scores.values())


def test_what_no_subspace_reaches_and_what_one_dimension_does_is_said() -> None:
    assert found(runs(d90=1e9)).crossing.d == float("inf")
    assert max(found(runs(d90=1e9)).scores) == D
    least = found(runs(d90=0.01))
    assert (least.crossing.d, least.crossing.first, min(least.scores)) == (0.0, 1, 1)
    assert json.loads(json.dumps(found(runs(d90=1e9)).to_dict()))["crossing"]["d"] is None


def test_the_factor_says_how_far_from_the_start_a_search_goes() -> None:
    assert sorted(found(runs(d90=700.0), start=600, factor=2, resolution=2).scores) == [600, 1200]
    assert sorted(found(runs(d90=700.0), start=600, resolution=4).scores) == [600, 2400]
    assert sorted(found(runs(d90=700.0), start=901, factor=1.5, resolution=2).scores) == [600, 901]


def test_a_search_goes_down_to_the_least_d_there_is(tmp_path: Path) -> None:
    own = found(runs(d90=0.01), least=7)
    assert (own.crossing.d, own.crossing.first, min(own.scores)) == (0.0, 7, 7)
    assert min(found(runs(d90=7.0), least=7).scores) == 7
    for plan in ({"grid": (2000, 6)}, {"start": 6}):
        with pytest.raises(UsageError, match="d is 6, but must be at least 7, since SAID spends 6 on the λ of its"):
            found(runs(notes=tmp_path / "notes"), least=7, **plan)
    assert not (tmp_path / "notes").exists()


def test_the_search_goes_on_below_a_d_that_does_better_than_the_next() -> None:
    """50 is below the threshold, 0.9, but 25 and 50 together are not, so that the fit is above it from 25 on."""
    curve = {12: (0.5, 0.5, 0.5), 25: (0.96, 0.96, 0.96), 50: (0.95, 0.8, 0.8), 100: (0.97, 0.97, 0.97)}

    own = found(
        runs_of(lambda run: (1.0 if run.d is None else curve[run.d][run.seed],) * 3), start=100, factor=2, resolution=2
    )
    assert list(own.scores) == [12, 25, 50, 100]
    assert 12 < own.crossing.low <= own.crossing.d <= own.crossing.high < 100


def test_a_search_ends_at_the_largest_d_there_is_room_for(tmp_path: Path) -> None:
    own = found(runs(d90=1e9), most=2000)
    assert (own.crossing.d, max(own.scores)) == (float("inf"), 2000)
    assert max(found(runs(d90=1e9), most=100).scores) == 100, "though the search would begin at √D"
    for plan in ({"grid": (100, 2001)}, {"start": 2001}):
        with pytest.raises(UsageError, match=r"d is 2001, .* at most 2,000, beyond which this projection has no room"):
            found(runs(notes=tmp_path / "notes"), most=2000, **plan)
    assert not (tmp_path / "notes").exists()


def test_a_grid_is_tried_as_it_is_and_gives_the_first_crossing() -> None:
    own = found(runs(d90=700.0), grid=(100, 500, 750, 900))
    assert sorted(own.scores) == [100, 500, 750, 900]
    assert own.crossing.first == 750
    assert 500 < own.crossing.d < 750


def test_the_gap_is_of_the_same_runs_at_the_first_d_above_the_threshold() -> None:
    by_d = {10: (0.5, 0.45), 20: (0.97, 0.92), 40: (1.0, 0.93), None: (1.0, 0.95)}  # training and test score

    def score(run: Run) -> tuple[float, float, float]:
        training, test = by_d[run.d]
        return training - 0.01 * run.seed, 0.0, test

    own = found(runs_of(score), grid=(10, 20, 40))
    assert own.train_scores[20] == pytest.approx((0.97, 0.96, 0.95))
    assert {d: len(scores) for d, scores in own.train_scores.items()} == dict.fromkeys((10, 20, 40), 3)
    assert own.crossing.first == 20
    assert own.gap == pytest.approx(0.96 - 0.92)
    assert found(runs_of(score), grid=(10,)).gap is None
    assert found(runs(d90=700.0)).gap is None, "where the training score itself is what counts there is none"


@pytest.mark.parametrize("d90", [0.01, 700.0, 1e9])
def test_what_was_measured_comes_back_from_json(d90: float) -> None:
    own = found(runs(d90=d90), rates=(0.5, 1.0), threshold=Threshold("absolute", 0.8))
    assert Measured.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    assert Measured.from_dict(own.to_dict()) == own
    short = {**own.to_dict(), "train_scores": {}}
    with pytest.raises(ValueError, match="not of the same runs"):
        Measured.from_dict(short)


@pytest.mark.parametrize(
    "wrong",
    [
        {"chance": math.nan},
        {"baseline": [1.5, 1.0, 1.0]},
        {"start": [math.nan]},
        {"D": 500},
        {"crossing": {"d": -3.0}},
        {"crossing": {"low": math.nan}},
    ],
    ids=str,
)
def test_a_measurement_with_numbers_that_cannot_be_is_refused(wrong: dict) -> None:
    plain = found(runs(d90=700.0)).to_dict()
    wrong = {key: {**plain[key], **value} if isinstance(value, dict) else value for key, value in wrong.items()}
    with pytest.raises(ValueError, match=r"not from 0 to 1|below 1 or above D"):
        Measured.from_dict({**plain, **wrong})


def test_an_older_measurement_has_no_score_of_the_start() -> None:
    plain = found(runs(d90=700.0)).to_dict()
    assert plain.pop("start") == (0.1, 0.1, 0.1)
    assert Measured.from_dict(plain).start is None


def test_rates_are_scaled_and_chosen_by_a_seed_of_their_own() -> None:
    own = runs(d90=700.0)
    done = found(own, rates=(0.5, 1.0, 2.0), lr=1e-3)
    assert {run.seed for run in own.known} == {0, 1, 2, SWEEP_SEED}
    swept = [run for run in own.known if run.seed == SWEEP_SEED]
    assert len(swept) == 3 * (len(done.scores) + 1), "the baseline is tuned like every d"
    plain = found(runs(d90=700.0), lr=1e-3)
    assert plain.baseline_rate == 1e-3
    assert all(rate == pytest.approx(1e-3 * (D / d) ** 0.5) for d, rate in plain.rates.items())
    assert set(found(runs(d90=700.0), lr=1e-3, lr_scale="none").rates.values()) == {1e-3}


def test_a_multiple_can_be_chosen_at_the_first_d_for_all(tmp_path: Path) -> None:
    own = runs(d90=700.0)
    done = found(own, rates=(0.5, 1.0, 2.0), rates_at="first", lr=1e-3)
    swept = [run for run in own.known if run.seed == SWEEP_SEED]
    assert {run.d for run in swept} == {None, round(D**0.5)}
    assert len(swept) == 2 * 3
    assert all(rate == pytest.approx(0.5e-3 * (D / d) ** 0.5) for d, rate in done.rates.items()), "all score alike"
    assert done.scores == found(runs(d90=700.0), lr=1e-3).scores


@pytest.mark.parametrize("grid", [(), (10, 40, 160, 640, 2560)])
def test_a_choice_waits_for_a_d_where_something_is_learned(grid: tuple[int, ...]) -> None:
    def score(run: Run) -> tuple[float, float, float]:
        d, multiple = run.d or D, run.lr / (1e-3 * (D / (run.d or D)) ** 0.5)
        learned = d >= 160 and multiple > 3
        # Below that the least multiple is the best by luck alone.
        return ((0.95 if d >= 2560 else 0.6) if learned or run.d is None else 0.1 - 1e-4 * multiple,) * 3

    own = runs_of(score)
    done = found(own, rates=(1.0, 2.0, 4.0), rates_at="first", lr=1e-3, start=10, resolution=4, grid=grid)
    multiples = {d: round(rate / (1e-3 * (D / d) ** 0.5)) for d, rate in done.rates.items()}
    assert (multiples, done.baseline_rate) == ({10: 1, 40: 1, 160: 4, 640: 4, 2560: 4}, 1e-3)
    assert {run.d for run in own.known if run.seed == SWEEP_SEED} >= {None, 10, 40, 160}
    if not grid:
        assert {run.d for run in own.known if run.seed == SWEEP_SEED} == {None, 10, 40, 160}


def test_the_multiple_that_is_chosen_is_the_best_by_validation() -> None:
    def score(run: Run) -> tuple[float, float, float]:
        best = 1e-3 if run.d is None else 2e-3
        return 0.9, 1 - abs(run.lr - best) if run.d in (None, 10) else 1 - run.lr, 0.9

    plan = {"rates": (1.0, 2.0, 4.0), "lr_scale": "none", "grid": (10, 20)}
    own = found(runs_of(score), **plan)
    assert (own.rates, own.baseline_rate, own.chosen_by) == ({10: 2e-3, 20: 1e-3}, 1e-3, "validation")
    assert found(runs_of(score), rates_at="first", **plan).rates == {10: 2e-3, 20: 2e-3}


def test_a_rate_at_which_a_run_diverged_is_not_chosen(tmp_path: Path) -> None:
    def train(run: Run) -> Outcome:
        bad, score = run.lr > 1.5e-3, 0.1 if run.d == 0 else 0.99 if run.lr > 1.5e-3 else 0.95
        return Outcome(run.seed, run.d or D, run.lr, score, score, score, 2.0, 9.0 if bad else 0.1, 1.0, 10, bad)

    own = found(Runs(lambda: train, {}), rates=(1.0, 2.0), lr=1e-3, lr_scale="none", grid=(10, 20))
    assert (own.baseline_rate, own.rates, own.diverged) == (1e-3, {10: 1e-3, 20: 1e-3}, 0)


def test_all_parameters_have_a_rate_of_their_own_beside_d_equal_to_them() -> None:
    own = found(
        runs_of(lambda run: (1 - abs(run.lr - (2e-3 if run.d is None else 1e-3)),) * 3), rates=(1.0, 2.0), grid=(D,)
    )
    assert (own.baseline_rate, own.rates) == (2e-3, {D: 1e-3})


def test_whether_something_is_learned_is_asked_of_the_split_that_chooses() -> None:
    """80 % of the validation split are of one class, half of the test split: guessing that class is no learning."""

    def score(run: Run) -> tuple[float, float, float]:
        learned = run.d is None or (run.d >= 160 and run.lr > 3e-3)
        return (0.95, 0.97, 0.95) if learned else (0.5, 0.8, 0.5)

    plan = Plan(rates=(1.0, 4.0), rates_at="first", lr=1e-3, lr_scale="none", grid=(10, 40, 160))
    own = measure(runs_of(score), D, plan, scored=Judged("test", 0.5, 10_000), chosen=Judged("validation", 0.8, 500))
    assert own.rates == {10: 1e-3, 40: 1e-3, 160: 4e-3}


def test_stored_runs_are_not_trained_again(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    first = found(runs(tmp_path / "search", notes=notes))
    trained = notes.read_text().splitlines()
    assert len(trained) == len(set(trained))
    again = found(runs(tmp_path / "search", notes=notes))
    assert notes.read_text().splitlines() == trained
    assert again == first


def test_a_worker_that_the_system_ends_is_told_as_such() -> None:
    own = Runs(made_up_trainer.killed_trainer, {}, workers=2)
    with closing(own), pytest.raises(TrimtabError, match="ended from outside, as a system does that is out of memory"):
        own.outcomes([Run(10, 0, 1e-3), Run(20, 0, 1e-3)])


def test_two_workers_find_the_same() -> None:
    assert found(runs(workers=2)) == found(runs())


def test_more_workers_train_nothing_that_one_would_not() -> None:
    plan = {"grid": (500, 700, 900), "rates": (0.5, 1.0, 2.0), "rates_at": "first"}
    one, two = runs(), runs(workers=2)
    assert found(one, **plan) == found(two, **plan)
    assert set(one.known) == set(two.known)


@pytest.mark.parametrize("rates", [(1.0,), (0.5, 1.0)])
def test_no_worker_is_idle_while_it_is_certain_what_comes_next(rates: tuple[float, ...], tmp_path: Path) -> None:
    plan, notes = {"seeds": 1, "grid": (100, 500, 900), "rates": rates}, tmp_path / "notes"
    assert found(runs(tmp_path, 2, notes=notes, paired=True), **plan) == found(runs(), **plan)
    assert len({line.split()[2] for line in notes.read_text().splitlines()}) == 2
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4 * (1 if len(rates) == 1 else 3) + 1


SEARCH = """
import functools, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import made_up_trainer
from trimtab.subspace.runs import Runs
from trimtab.subspace.judged import Judged
from trimtab.subspace.plan import Plan
from trimtab.subspace.search import measure
make = functools.partial(made_up_trainer.trainer, notes=Path({notes!r}), seconds=0.1)
if __name__ == "__main__":
    runs = Runs(make, {{"task": "made up"}}, Path({folder!r}), workers={workers})
    measure(runs, made_up_trainer.D, Plan(), scored=Judged("test", 0.1, 100))
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_search_goes_on_where_it_was(stop: signal.Signals, workers: int, tmp_path: Path) -> None:
    notes, folder, script = tmp_path / "notes", tmp_path / "search", tmp_path / "search.py"
    tests = str(Path(__file__).parent)
    script.write_text(SEARCH.format(tests=tests, notes=str(notes), folder=str(folder), workers=workers))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 300
    while (not notes.exists() or len(notes.read_text().splitlines()) < 6) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, stop)
    try:
        process.communicate(timeout=300)  # until nobody holds the pipe: the workers have ended too
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    begun, kept = (len(path.read_text().splitlines()) for path in (notes, folder / "runs.jsonl"))
    assert kept >= begun - 2 * workers, "each has one under way, and may have ended one"
    with (folder / "runs.jsonl").open("a") as file:
        file.write('{"run": {"d"')  # as a kill in the middle of writing leaves it
    assert found(runs(folder, notes=notes)) == found(runs())
    whole = len(found(runs()).scores) * 3 + 6
    assert len(notes.read_text().splitlines()) - begun == whole - kept


def test_runs_of_another_search_are_refused(tmp_path: Path) -> None:
    found(runs(tmp_path))
    with pytest.raises(UsageError, match=r"task 'made up', but now 'mnist'"):
        runs(tmp_path, about={"task": "mnist"})
    line = json.loads(kept := (tmp_path / "runs.jsonl").read_text().splitlines()[0])
    scores = [{"outcome": {**line["outcome"], "test": wrong}} for wrong in ("0.5", 7.5, -0.1, float("nan"))]
    other = *scores, {"run": {**line["run"], "d": "5"}}, {"run": [1, 2, 3]}
    for wrong in ({"something": "else"}, *({**line, **part} for part in other)):
        (tmp_path / "runs.jsonl").write_text(f"{kept}\n{json.dumps(wrong)}\n")
        with pytest.raises(FormatError, match="line 2 is no run of a search"):
            runs(tmp_path)
    (tmp_path / "search.json").unlink()
    with pytest.raises(UsageError, match=r"without search\.json"):
        runs(tmp_path)


ABOUT = {"task": "made up", "epochs": 3, "projection": "uni", "options": {}, "mode": "did"}


def test_runs_that_would_be_trained_alike_are_taken_from_another_search(tmp_path: Path) -> None:
    notes, first = tmp_path / "notes", runs(tmp_path / "first", about=ABOUT)
    whole = found(first)
    with (tmp_path / "first" / "runs.jsonl").open("a") as file:
        file.write('{"run": {"d"')  # as another process is writing it
    content = (tmp_path / "first" / "runs.jsonl").read_bytes()
    same = runs(tmp_path / "same", about=ABOUT, notes=notes)
    same.take(tmp_path / "first")
    assert found(same) == whole
    assert not notes.exists(), "all of them are taken"
    other = runs(tmp_path / "other", about={**ABOUT, "projection": "fastfood", "options": {"diagonal": "sign"}})
    other.take(tmp_path / "first")
    assert other.known == {run: outcome for run, outcome in first.known.items() if not run.d}
    assert len(other.known) == 6
    assert runs(tmp_path / "other", about=json.loads((tmp_path / "other" / "search.json").read_text())).known
    assert (tmp_path / "first" / "runs.jsonl").read_bytes() == content


def test_runs_that_would_be_trained_otherwise_are_not_taken(tmp_path: Path) -> None:
    found(runs(tmp_path / "first", about=ABOUT), grid=(5,))
    other = runs(about={**ABOUT, "projection": "dense", "epochs": 4})
    with pytest.raises(UsageError, match=r"another search: epochs 3, but now 4: choose another folder"):
        other.take(tmp_path / "first")
    with pytest.raises(UsageError, match=r"search\.json does not exist"):
        other.take(tmp_path)
    assert not other.known


def test_a_threshold_that_guessing_reaches_is_refused() -> None:
    with pytest.raises(NoDimension, match=r"guessing scores 0\.680"):
        found(runs(baseline=0.75), chance=0.68)
    with pytest.raises(NoDimension, match="any d would pass"):
        found(runs(), chance=0.5, threshold=Threshold("absolute", 0.505))


@pytest.mark.parametrize(
    ("baseline", "threshold", "reason"),
    [
        (0.85, Threshold("global", 0.9), "baseline below the threshold"),
        (0.5, Threshold("absolute", 0.7), "near chance"),
    ],
    ids=str,
)
def test_a_baseline_that_misses_the_threshold_is_refused_before_any_subspace(
    baseline: float, threshold: Threshold, reason: str
) -> None:
    own = runs(baseline=baseline)
    with pytest.raises(NoDimension) as error:
        found(own, chance=0.5, threshold=threshold)
    assert reason in error.value.reason
    assert {run.d for run in own.known} == {None, 0}


def test_a_start_that_needs_no_training_is_refused_before_any_subspace() -> None:
    own = runs_of(lambda run: (0.9, 0.9, 0.9), start=0.85)
    with pytest.raises(NoDimension, match=r"before any training the model comes to 0\.850, .* to 0\.810") as error:
        found(own)
    assert error.value.reason == "reached without training"
    assert {run.d for run in own.known} == {None, 0}
    assert found(runs_of(lambda run: (0.9, 0.9, 0.9), start=0.8)).start == (0.8, 0.8, 0.8)


def test_a_loss_that_is_no_number_is_refused_before_any_training() -> None:
    own = runs_of(lambda run: (0.9, 0.9, 0.9), first_loss=math.nan)
    with pytest.raises(NoDimension, match="no number before any training: weights of the model, or its data"):
        found(own)
    assert {run.d for run in own.known} == {0}


@pytest.mark.parametrize("plan", [{"rates": (1.0, 4.0, 16.0)}, {"threshold": Threshold("absolute", 0.85)}])
def test_no_worker_trains_before_the_start_is_known_to_be_of_use(plan: dict[str, Any]) -> None:
    own = Runs(functools.partial(made_up_trainer.knowing_trainer, plan.get("threshold") is None), {}, workers=2)
    with pytest.raises(NoDimension, match="before any training"):
        found(own, **plan)
    assert {run.d for run in own.known} == {0}


def test_a_share_of_one_is_no_more_than_the_baseline_itself() -> None:
    baseline = (0.9783, 0.9545, 0.9589, 0.9524, 0.9749, 0.9585, 0.9677, 0.9655)
    assert sum(baseline) / len(baseline) < np.mean(baseline)  # to the last bit
    own = found(runs_of(lambda run: (baseline[run.seed],) * 3), seeds=8, threshold=Threshold("local", 1.0))
    assert own.crossing.threshold == own.mean_baseline


@pytest.mark.parametrize(("score", "clear"), [(0.519, False), (0.521, True)])
def test_clear_of_chance_is_two_standard_errors_above_it(score: float, clear: bool) -> None:
    assert Judged("test", 0.5, 2500).noise == pytest.approx(0.02)
    assert (score > Judged("test", 0.5, 2500).clear) == clear


@pytest.mark.parametrize("mode", ["global", "absolute", "local"])
def test_a_threshold_that_is_known_beforehand_is_refused_before_any_training(mode: str, tmp_path: Path) -> None:
    with pytest.raises(NoDimension, match="any d would pass"):
        found(runs(notes=tmp_path / "notes"), chance=0.5, threshold=Threshold(mode, 0.505))
    assert not (tmp_path / "notes").exists()


def test_a_baseline_that_diverged_is_refused() -> None:
    with pytest.raises(NoDimension, match="diverged with seed 0"):
        found(runs(diverges=True))


@pytest.mark.parametrize(
    "plan",
    [
        {"grid": (0, 5)},
        {"grid": (5, D + 1)},
        {"start": D + 1},
        {"seeds": 0},
        {"lr": 0.0},
        {"lr_scale": "d"},
        {"rates_at": "last"},
        {"rates": ()},
        {"rates": (1.0, float("inf"))},
        {"lr": float("inf")},
        {"seeds": SWEEP_SEED + 1},
        {"seeds": 1.5},
        {"start": 2.5},
        {"factor": 1},
    ],
    ids=str,
)
def test_plans_that_cannot_be_are_refused_before_any_training(plan, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with pytest.raises(UsageError):
        found(runs(notes=notes), **plan)
    assert not notes.exists()
