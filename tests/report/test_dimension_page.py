"""The pages about intrinsic dimension: of one measurement, of several side by side, along a pretraining."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UsageError
from trimtab.report.dimension_comparison import (
    comparison_results,
    comparison_sentences,
    comparison_table,
    series_sentences,
    write_comparison,
    write_series,
)
from trimtab.report.dimension_page import render, write_dimension
from trimtab.report.dimension_plots import gap_against_bound
from trimtab.report.dimension_results import (
    Measurement,
    Told,
    Unmeasured,
    choice,
    protocol_of,
    read_measurements,
    result,
    sentences,
    told,
)
from trimtab.subspace.crossing import Threshold, crossing
from trimtab.subspace.measured import Measured
from trimtab.subspace.plan import Plan

PROTOCOL = {"task": "made up", "projection": "uni", "weights": "0f0f", "epochs": 3, "betas": (0.9, 0.99), "lr": 1e-3}


TRIED = (50, 100, 150, 250, 500, 1000)


def measured(
    d90: float = 200.0,
    *,
    D: int = 10_000,
    baseline: float = 0.9,
    gap: float = 0.05,
    ds: Sequence[int] = TRIED,
    **plan: Any,
) -> Measured:
    """A search on a curve that meets 0.9 of the baseline at d90, scored lower than training by `gap`."""
    curve = {d: baseline / (1 + math.exp(-2 * math.log(d / d90) - math.log(9))) for d in ds}
    scores = {d: tuple(max(value + 0.004 * shift, 0.0) for shift in (-1, 0, 1)) for d, value in curve.items()}
    train_scores = {d: tuple(min(max(score + gap, 0.0), 1.0) for score in own) for d, own in scores.items()}
    whole, settled = (baseline - 0.002, baseline, baseline + 0.002), Plan(**plan)
    return Measured(
        D=D,
        crossing=crossing(scores, whole, settled.threshold),
        scores=scores,
        train_scores=train_scores,
        start=(0.12, 0.12, 0.13),
        baseline=whole,
        baseline_rate=settled.lr,
        rates={d: settled.lr * (math.sqrt(D / d) if settled.lr_scale == "sqrt" else 1.0) for d in ds},
        chosen_by="validation",
        diverged=0,
        chance=0.1,
        plan=settled,
    )


def about(title: str = "made up", *, n: int = 1000, metric: str = "accuracy", **protocol: Any) -> Told:
    return Told(title, metric, "400 test rows", n, {**PROTOCOL, **protocol})


def named(*labels: str, **changes: Any) -> list[Measurement]:
    """Measurements by these labels, whose d90 and baseline rise from one to the next."""
    return [
        Measurement(label, 100 * place, measured(120.0 + 60 * place, baseline=0.8 + 0.03 * place), about(**changes))
        for place, label in enumerate(labels)
    ]


def kept(folder: Path, measured: Measured, told: Told) -> str:
    write_dimension(measured, told, folder)
    return str(folder)


def drawings(page: str) -> list[str]:
    return [ElementTree.fromstring(own).attrib["aria-label"] for own in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    own = [measured(), measured(5000.0, D=20_000, grid=(50, 100))]
    told = [dataclasses.replace(about("first"), features=(640, 4)), about("second", n=77)]
    folders = [kept(tmp_path / name, *pair) for name, *pair in zip("ab", own, told, strict=True)]
    several = read_measurements(folders)
    assert [one.label for one in several] == ["a", "b"]
    assert [one.measured for one in several] == own
    assert [one.about.n for one in several] == [1000, 77]
    assert several[0].about.features == (640, 4)
    assert comparison_table(several) == comparison_table(
        [Measurement(label, 0, *pair) for label, *pair in zip("ab", own, told, strict=True)]
    )
    assert json.loads((tmp_path / "a" / "results.json").read_text())["gap"] == pytest.approx(0.05)


def test_folders_of_one_name_are_called_by_what_their_paths_do_not_share(tmp_path: Path) -> None:
    names = ("x/run", "y/2/run", "y/2/run/run", "z/other")
    folders = [kept(tmp_path / name, measured(), about()) for name in names]
    assert [one.label for one in read_measurements(folders)] == [*names[:3], "other"]


def test_labels_that_have_no_room_are_left_out_of_a_figure() -> None:
    points = [(f"a long label of number {number}", 0.1 + number / 1e5, 0.02) for number in range(40)]
    drawn = gap_against_bound(points, "gap")
    places = re.findall(r'y="([\d.]+)"[^>]*>a long label', drawn)
    assert 2 <= len(places) < 40
    heights = sorted(map(float, places))
    assert all(above - below >= 8 for below, above in itertools.pairwise(heights)), "none is on another"


def test_thresholds_that_differ_are_refused(tmp_path: Path) -> None:
    first = kept(tmp_path / "a", measured(), about())
    for other in (Threshold("global", 0.9), Threshold("local", 0.8)):
        second = kept(tmp_path / "b", measured(threshold=other), about())
        with pytest.raises(
            UsageError, match=r"only under one threshold, but a has 0\.9 of the baseline \(local\), b has"
        ):
            read_measurements([first, second])


def change(path: Path, **changes: Any) -> None:
    plain = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in plain.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_scores": None}, "is an older one, without the scores of training: measure again with the same flags"),
        ({"n": None}, "is an older one"),
        ({"scores": None}, "is of no single measurement"),
        ({"crossing": {}}, "is of no single measurement"),
        ({"scores": [1, 2]}, "is of no single measurement"),
        ({"protocol": "none"}, "is of no single measurement"),
        ({"baseline": []}, "is of no single measurement"),
        ({"n": 0}, "is of no single measurement"),
        ({"D": math.inf}, "is of no single measurement"),
    ],
    ids=str,
)
def test_files_that_are_no_single_measurement_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folders = [kept(tmp_path / name, measured(), about()) for name in "ab"]
    change(tmp_path / "b" / "results.json", **changes)
    with pytest.raises(UsageError, match=said):
        read_measurements(folders)


def test_what_is_no_comparison_is_refused(tmp_path: Path) -> None:
    first, second = (kept(tmp_path / name, measured(), about()) for name in "ab")
    with pytest.raises(UsageError, match="two measurements, or more"):
        read_measurements([first])
    with pytest.raises(UsageError, match="a is given twice"):
        read_measurements([first, second, f"{tmp_path}/b/../a"])
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(UsageError, match=rf"{folder} holds no results\.json"):
            read_measurements([first, str(tmp_path / folder)])
    write_comparison(read_measurements([first, second]), tmp_path / "both")
    with pytest.raises(UsageError, match="of several, name the folder of each"):
        read_measurements([first, str(tmp_path / "both")])


def test_the_gap_and_its_bound_stand_in_the_table() -> None:
    own = measured(200.0, gap=0.05)
    one = Measurement("a", 0, own, about(n=1000))
    none = Measurement("b", 1, measured(1e6, gap=0.05), about(n=1000))
    head = comparison_table([one, none]).head
    first, second = (dict(zip(head, row, strict=True)) for row in comparison_table([one, none]).rows)
    assert own.crossing.first == 250
    at_first = ("first d", "gap at first d", "√(first d/n)")
    assert [first[name] for name in at_first] == ["250", "+0.0500", "0.5000"]
    assert [second[name] for name in at_first] == ["–", "–", "–"]
    assert second["d90"] == "above 1,000, the largest d tried"
    assert (first["untrained"], first["chance"]) == ("0.1233", "0.1000")
    older = one._replace(measured=dataclasses.replace(own, start=None))
    assert comparison_table([older]).rows[0][head.index("untrained")] == "–"
    below = Measurement("c", 2, measured(200.0, gap=-0.03), about())
    assert comparison_table([below, one]).rows[0][head.index("gap at first d")] == "−0.0300"


def test_a_page_of_several_says_all_of_them_and_needs_nothing_else(tmp_path: Path) -> None:
    labels = ["plain", "a <b>", "three", "four", "five", "a name of more than thirty-two letters, all told"]
    several = named(*labels)
    several[1] = several[1]._replace(measured=measured(180.0, D=40_000), about=about("another", epochs=5, model="m"))
    several[2] = several[2]._replace(measured=measured(1e6))
    page = write_comparison(several, tmp_path / "one").read_text()
    for label in labels:
        assert label.replace("<", "&lt;").replace(">", "&gt;") in page
    assert "a <b>" not in page
    assert "<script" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert write_comparison(several, tmp_path / "two").read_text() == page
    rows, parameters, baseline, gap = drawings(page)
    assert all(label in rows for label in labels)
    assert "three above 1,000, the largest d tried" in rows
    assert "all parameters, D: " in parameters
    assert re.search(r"; a <b> 18\d at 40,000", parameters)
    assert "without one: three" in baseline
    assert several[0].measured.crossing.first == 150
    assert f"plain +0.0500 beside {math.sqrt(150 / 1000):.4f}" in gap
    assert "three" not in gap
    told = json.loads((tmp_path / "one" / "results.json").read_text())
    assert [one["label"] for one in told["measurements"]] == labels
    assert told == json.loads(json.dumps(comparison_results(several)))


def section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
    return found[0] if found else ""


def test_what_differs_stands_apart_from_what_is_shared(tmp_path: Path) -> None:
    first, second = named("a", "b")
    alike = write_comparison([first, second], tmp_path).read_text()
    assert not section(alike, "differing")
    assert "0.9, 0.99" in section(alike, "protocol")
    assert "not trained alike" not in alike
    other = second._replace(about=about(projection="dense", epochs=5))
    page = write_comparison([first, other], tmp_path).read_text()
    assert all(word in section(page, "differing") for word in ("projection", "dense", "epochs"))
    assert "betas" not in section(page, "differing")
    assert "betas" in section(page, "protocol")
    assert "epochs" not in section(page, "protocol")
    assert "They were not trained alike (epochs): the dimension depends on that too" in page


def test_the_sentences_judge_by_the_intervals() -> None:
    low, high = (Measurement(str(d), 0, measured(d), about()) for d in (120.0, 480.0))
    least, apart, _ = comparison_sentences([high, low])
    assert least.startswith("d90 is least for 120.0, ")
    assert "and largest for 480.0, " in least
    assert apart == "The intervals of the two are apart"
    assert "do not say which is larger" in comparison_sentences([low, low._replace(label="same")])[1]
    few = low._replace(label="few", measured=measured(seeds=2))
    assert comparison_sentences([low, few])[-1].endswith("no interval, or a very wide one: few")


def test_a_dimension_is_called_by_its_threshold_on_the_page_too(tmp_path: Path) -> None:
    for threshold, name in ((Threshold("local", 0.8), "d80"), (Threshold("absolute", 0.8), "The intrinsic dimension")):
        own = [Measurement(str(d), int(d), measured(d, threshold=threshold), about()) for d in (120.0, 480.0)]
        assert comparison_sentences(own)[0].startswith(f"{name} is least for 120.0, ")
        assert comparison_table(own).head[3] == name.removeprefix("The ")
        for page in (write_comparison(own, tmp_path / "c"), write_series(own, "made up", "step", tmp_path / "s")):
            assert "d90" not in page.read_text()


def of(label: str, ds: Sequence[int], d90: float) -> Measurement:
    """A search that tried exactly these d."""
    return Measurement(label, 0, measured(d90, ds=ds), about())


def test_what_has_no_dimension_is_neither_least_nor_largest() -> None:
    below, small = of("below", (100, 200, 400), 20.0), of("small", (10, 20, 40, 80), 30.0)
    above, large = of("above", (250, 500, 1000), 1e5), of("large", (2000, 4000, 8000), 5000.0)
    assert (below.measured.crossing.d, below.measured.crossing.high, above.measured.crossing.low) == (0, 0, math.inf)
    one, rest, _ = comparison_sentences([below, small])
    assert one.startswith("d90 of small is ")
    assert rest == "Without one within the d that were tried: below at most 100, the smallest d tried"
    least, apart, rest, _ = comparison_sentences([below, large, above, small])
    assert "least for small, " in least
    assert "largest for large, " in least
    assert apart == "The intervals of the two are apart"
    assert rest.endswith(": below at most 100, the smallest d tried; above above 1,000, the largest d tried")
    none, _ = comparison_sentences([below, above])
    assert none.startswith("None has a d90")
    assert "below at most 100" in none


def test_an_open_interval_is_not_apart() -> None:
    small, large = of("small", (10, 20, 40, 80), 30.0), of("large", (2000, 4000, 8000), 5000.0)
    for opened, end in ((large, {"low": 0.0}), (small, {"high": math.inf})):
        crossing = dataclasses.replace(opened.measured.crossing, **end)
        changed = opened._replace(measured=dataclasses.replace(opened.measured, crossing=crossing))
        pair = [changed if one is opened else one for one in (small, large)]
        assert "do not say which is larger" in comparison_sentences(pair)[1]


def test_a_series_is_judged_by_what_is_known_of_its_ends() -> None:
    below, small = of("below", (100, 200, 400), 20.0), of("small", (10, 20, 40, 80), 30.0)
    above, large = of("above", (250, 500, 1000), 1e5), of("large", (2000, 4000, 8000), 5000.0)
    for meeting in ([below, small], [small, below], [above, large], [large, above], [above, above]):
        assert "do not say that it falls or rises" in series_sentences(meeting, "made up")[1]
    for first, last in ((below, above), (below, large), (small, above)):
        assert series_sentences([first, last], "made up")[1].startswith("It rises")
        assert series_sentences([last, first], "made up")[1].startswith("It falls")


def test_where_nothing_has_a_dimension_no_figure_is_drawn(tmp_path: Path) -> None:
    several = [Measurement(label, place, measured(1e6), about()) for place, label in enumerate("ab")]
    page = write_comparison(several, tmp_path).read_text()
    assert not drawings(page)
    assert "None has a d90 within the d that were tried" in page
    assert not drawings(write_series(several, "made up", "checkpoint", tmp_path).read_text())


def test_scores_of_different_kinds_share_no_axis(tmp_path: Path) -> None:
    first, second = named("a", "b")
    page = write_comparison([first, second._replace(about=about(metric="F1"))], tmp_path).read_text()
    assert len(drawings(page)) == 1


def test_a_figure_against_what_is_the_same_for_all_is_left_out(tmp_path: Path) -> None:
    several = [Measurement(str(d), 0, measured(d), about()) for d in (120.0, 480.0)]
    rows, gap = drawings(write_comparison(several, tmp_path).read_text())
    assert "120.0" in rows
    assert "Generalisation gap" in gap


def test_a_series_has_its_figures_over_its_steps(tmp_path: Path) -> None:
    series = named("step-0", "step-100", "step-200")
    page = write_series(series, "made up, DID", "step of pretraining", tmp_path).read_text()
    along, baseline, gap = drawings(page)
    assert re.search(r"against step of pretraining: step-0 \d+ at 0; step-100 \d+ at 100; ", along)
    assert "accuracy of the baseline" in baseline
    assert "step-200 +0.0500" in gap
    assert "It rises along the series" in page
    told = json.loads((tmp_path / "results.json").read_text())
    assert [one["at"] for one in told["series"]] == [0, 100, 200]
    assert told["series"][1] == json.loads(json.dumps(series[1].to_dict()))


def test_a_checkpoint_that_is_not_measured_keeps_its_row(tmp_path: Path) -> None:
    first, second = named("step-0", "step-200")
    missing = Unmeasured("step-100", 100, "made up", 10_000, "baseline diverged", "training diverged with seed 0")
    page = write_series([first, missing, second], "made up", "step of pretraining", tmp_path).read_text()
    rows = comparison_table([first, missing, second]).rows
    assert [row[0] for row in rows] == ["step-0", "step-100", "step-200"]
    assert len({len(row) for row in rows}) == 1
    assert "not measured: baseline diverged" in section(page, "runs")
    assert "step-100 is not measured: training diverged with seed 0." in section(page, "verdict")
    assert "It rises along the series" in page
    assert json.loads((tmp_path / "results.json").read_text())["series"][1]["reason"] == "baseline diverged"
    one, note, _ = series_sentences([missing, second], "made up")
    assert re.fullmatch(r"d90 of made up is 1.*\] at step-200, the threshold being 0\.9 of the baseline \(local\)", one)
    assert note.startswith("step-100 is not measured")


TRAINED = {"epochs": 3, "batch_size": 32, "optimizer": "sgd", "l2": 1e-4, "mode": "said"}


def test_metric_split_and_how_runs_are_trained_stand_in_the_sentences() -> None:
    own, plan = about(**TRAINED), {"lr": 2e-3, "rates": (0.5, 1.0, 2.0)}
    first, protocol, *_ = sentences(measured(**plan), own)
    assert "where accuracy on 400 test rows reaches" in first
    assert "θ0 at 0.1233 untrained and chance at 0.1" in first
    assert "untrained" not in sentences(dataclasses.replace(measured(), start=None), own)[0], "of an older result"
    assert protocol == (
        "Each run was trained with 3 epochs, batches of 32, optimizer sgd, L2 0.0001, mode said, projection uni, "
        "learning rate 0.002 for all parameters and times √(D/d) in a subspace, each times the best of 0.5, 1, 2 by "
        "the validation split"
    )
    plain = sentences(measured(lr_scale="none"), own)[1]
    assert plain.endswith("learning rate 0.001 for all parameters and the same in a subspace")
    alike, other = named("a", "b", **TRAINED), Measurement("c", 2, measured(), about(epochs=5))
    for said in (comparison_sentences(alike), series_sentences(alike, "made up")):
        assert sum("Each run was trained with 3 epochs" in sentence for sentence in said) == 1
    assert not any("Each run" in sentence for sentence in comparison_sentences([*alike, other]))


def test_which_multiple_of_the_rate_was_chosen_is_said_and_that_it_is_the_last_one_tried() -> None:
    own = measured(rates=(0.5, 1.0, 2.0))
    assert choice(own) == "The best multiple of the learning rate was 1 for all parameters and 1 in every subspace"
    last = dataclasses.replace(own, rates={d: rate * (2 if d > 100 else 1) for d, rate in own.rates.items()})
    assert choice(last) == (
        "The best multiple of the learning rate was 1 for all parameters and in subspaces 1 at d = 50 to 100, 2 at d = "
        "150 to 1,000; nothing beyond 2 was tried"
    )
    assert choice(last) in sentences(last, about())
    assert choice(measured()) is None
    alike = Measurement("a", 0, own, about()), Measurement("b", 1, last, about())
    assert comparison_sentences(alike)[-1].startswith("b: the best multiple of the learning rate was 1 for all")


def test_what_is_not_reached_with_all_dimensions_is_said_of_the_rates_and_not_of_d() -> None:
    own = measured(1e6, D=1000)
    assert told(own) == "not reached at any d tried, D included, at these learning rates"
    assert "bootstrap" not in sentences(own, about())[0]
    assert told(measured(1e6, D=10_000)) == "above 1,000, the largest d tried"


def test_the_interval_of_what_lies_beyond_the_d_tried_is_told_where_it_has_an_end() -> None:
    above, below = measured(1e6), measured(1.0)
    for own, end, words in (
        (above, {"low": 700.0}, "above 1,000, the largest d tried; from 700 on by its interval"),
        (below, {"high": 66.6}, "at most 50, the smallest d tried; up to 67 by its interval"),
    ):
        assert told(dataclasses.replace(own, crossing=dataclasses.replace(own.crossing, **end))) == words


def test_one_seed_is_told_without_an_interval() -> None:
    own = measured(seeds=1)
    first, *rest = sentences(own, about())
    assert "[" not in first
    assert "1 seed:" in first
    assert "One seed has no interval: take 3 or more" in rest


def test_one_seed_says_nothing_of_falling_or_of_which_is_larger() -> None:
    series = [Measurement(f"step-{at}", at, measured(d90, seeds=1), about()) for at, d90 in ((0, 500.0), (1, 60.0))]
    assert "One seed has no interval, so these runs do not say that it falls or rises" in series_sentences(series, "x")
    assert "One seed has no interval, so these runs do not say which is larger" in comparison_sentences(series)


@pytest.mark.parametrize(
    ("threshold", "start", "words"),
    [
        (Threshold("local", 0.9), "d90 of made up", "reaches 0.81, 0.9 of the baseline (local),"),
        (Threshold("local", 0.5), "d50 of made up", "reaches 0.45, 0.5 of the baseline (local),"),
        (Threshold("global", 0.8), "d80 of made up", "reaches 0.8 of 1.0 (global),"),
        (Threshold("absolute", 0.8), "The intrinsic dimension of made up", "reaches 0.8 (absolute),"),
    ],
    ids=str,
)
def test_the_threshold_is_told_once_and_gives_the_dimension_its_name(threshold: Threshold, start: str, words) -> None:
    first = sentences(measured(threshold=threshold), about())[0]
    assert first.startswith(start)
    assert words in first


def test_runs_on_sentences_tell_optimizer_and_l2_though_all_have_the_same(tmp_path: Path) -> None:
    trained = protocol_of({"task": "sst2", "epochs": 3}, Plan())
    own = dataclasses.replace(about(), protocol=trained)
    assert "optimizer adam, L2 0," in sentences(measured(), own)[1]
    older = kept(tmp_path / "older", measured(), about())
    same = kept(tmp_path / "same", measured(), about(optimizer="adam", l2=0.0, betas=(0.9, 0.99)))
    assert not section(write_comparison(read_measurements([older, same]), tmp_path).read_text(), "differing")


@pytest.mark.parametrize("features", [None, (0, 0)])
def test_what_has_no_matrices_is_told_that_a_rank_is_something_else(features: tuple[int, int] | None) -> None:
    said = sentences(measured(), dataclasses.replace(about(), features=features))[-1]
    assert said.startswith("No rank of a LoRA follows from it: r is the rank of each matrix")
    budget = sentences(measured(), dataclasses.replace(about(), features=(640, 4)))[-1]
    assert budget.startswith("Budget for LoRA: rank r trains r · 640 numbers on 4 weights, so rank 1 has 640")
    assert "r is the rank of each matrix" in budget


def test_the_page_of_one_is_the_same_byte_for_byte() -> None:
    page = render(measured(), about())
    assert page == render(measured(), about())
    assert len(drawings(page)) == 1
    assert not section(page, "differing")
    assert set(result(measured(), about())) >= {"n", "train_scores", "gap"}
