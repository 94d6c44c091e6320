"""Several measurements of an intrinsic dimension side by side, or along a pretraining: as JSON and as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.files import write_whole
from trimtab.report import wording
from trimtab.report.dimension_page import PAGE
from trimtab.report.dimension_plots import dimension_against, dimension_by_row, gap_against_bound
from trimtab.report.dimension_results import (
    RESULTS,
    Measurement,
    Unmeasured,
    as_json,
    choice,
    protocol_sentence,
    told,
)
from trimtab.report.direction_tables import Table
from trimtab.report.template import filled
from trimtab.subspace.crossing import Threshold

SUBJECT = frozenset(
    (
        *("metric", "scored on", "training examples", "seeds", "task", "data", "data_digest", "test", "parameters"),
        *("model", "weights", "pretrained", "mode", "layers", "projection", "diagonal", "options", "test_rows"),
    )
)
"""What measurements are compared over. What else differs is how their runs were trained, on which d90 depends too."""
ABSENT = "–"
GAP_CAPTION = (
    "Generalisation gap in accuracy, the error rate on what is scored less that on the training examples, against "
    "√(d/n), n being the training examples: both at the first d tried above the threshold. Aghajanyan et al. 2020 "
    "(arXiv 2012.13255) bound the loss of models trained in the subspace, test loss ≤ training loss + O(√(d/n)), while "
    "what is drawn is the error rate. The constant is not known either, so the dashed line says how the bound grows, "
    "not where it is."
)


def series_sentences(series: Sequence[Measurement | Unmeasured], title: str) -> list[str]:
    """Whether d90 falls from the first measured checkpoint to the last, by their intervals; which are not measured."""
    known = _measured(series)
    missing = [f"{one.label} is not measured: {one.told}" for one in series if isinstance(one, Unmeasured)]
    return [*_first_and_last(known, title), *missing, *_cautions(known)]


def _measured(series: Sequence[Measurement | Unmeasured]) -> list[Measurement]:
    return [one for one in series if isinstance(one, Measurement)]


def _first_and_last(series: Sequence[Measurement], title: str) -> list[str]:
    first, last = series[0], series[-1]
    threshold = first.measured.plan.threshold
    start = f"{threshold.dimension.replace('the', 'The')} of {title} is {told(first.measured)} at {first.label}"
    if len(series) == 1:
        return [f"{start}, the threshold being {threshold}"]
    said = [f"{start} and {told(last.measured)} at {last.label}, the threshold of each being {threshold}"]
    (first_low, first_high), (last_low, last_high) = first.bounds, last.bounds
    if not _have_intervals(first, last):
        said.append("One seed has no interval, so these runs do not say that it falls or rises")
    elif last_high < first_low:
        said.append("It falls along the series: the intervals of the first and the last are apart")
    elif first_high < last_low:
        said.append("It rises along the series: the intervals of the first and the last are apart")
    else:
        said.append("The intervals of the first and the last meet, so these runs do not say that it falls or rises")
    return said


def _have_intervals(*several: Measurement) -> bool:
    return all(one.measured.plan.seeds > 1 for one in several)


def comparison_sentences(several: Sequence[Measurement]) -> list[str]:
    """The least and the largest d90, whether they are apart by their intervals, and what is known of the others that
    have none within the d that were tried."""
    threshold = several[0].measured.plan.threshold
    found = sorted((one for one in several if one.found), key=lambda one: one.measured.crossing.d)
    without = "; ".join(f"{one.label} {told(one.measured)}" for one in several if not one.found)
    if not found:
        what = "an intrinsic dimension" if threshold.mode == "absolute" else f"a {threshold.dimension}"
        said = [f"None has {what} within the d that were tried, the threshold of each being {threshold}: {without}"]
        return said + _cautions(several)
    said = _least_and_largest(found, threshold)
    if without:
        said.append(f"Without one within the d that were tried: {without}")
    return said + _cautions(several)


def _least_and_largest(found: Sequence[Measurement], threshold: Threshold) -> list[str]:
    """Of measurements with a d90, the least first."""
    least, most = found[0], found[-1]
    name = threshold.dimension.replace("the", "The")
    if len(found) == 1:
        return [f"{name} of {least.label} is {told(least.measured)}; the threshold of each is {threshold}"]
    said = f"{name} is least for {least.label}, {told(least.measured)}, and largest for {most.label}, "
    apart = "The intervals of the two meet, so these runs do not say which is larger"
    if not _have_intervals(least, most):
        apart = "One seed has no interval, so these runs do not say which is larger"
    elif least.bounds[1] < most.bounds[0]:
        apart = "The intervals of the two are apart"
    return [f"{said}{told(most.measured)}; the threshold of each is {threshold}", apart]


def _cautions(several: Sequence[Measurement]) -> list[str]:
    """How all were trained where that is alike, and what makes the figures less sure."""
    trained = {protocol_sentence(one.measured, one.about) for one in several}
    said = list(trained) if len(trained) == 1 else []
    otherwise = [name for name, values in _entries(several).items() if name not in SUBJECT and len(set(values)) > 1]
    if otherwise:
        names = ", ".join(name.replace("_", " ") for name in otherwise)
        said.append(f"They were not trained alike ({names}): the dimension depends on that too, whatever else differs")
    few = [one.label for one in several if one.measured.plan.seeds < 3]
    if few:
        said.append(f"Fewer than 3 seeds make no interval, or a very wide one: {', '.join(few)}")
    choices = [(one.label, choice(one.measured)) for one in several]
    said += [f"{label}: {chosen[0].lower()}{chosen[1:]}" for label, chosen in choices if chosen]
    diverged = [f"{one.label} {one.measured.diverged}" for one in several if one.measured.diverged]
    if diverged:
        said.append(f"Runs in subspaces that diverged count with the score they ended with: {', '.join(diverged)}")
    return said


def comparison_table(several: Sequence[Measurement | Unmeasured]) -> Table:
    """A row of text for every measurement, and for what could not be measured."""
    name = next((one.measured.plan.threshold.dimension for one in several if isinstance(one, Measurement)), "d90")
    name = name.removeprefix("the ")
    levels = ("baseline", "threshold", "untrained", "chance")
    head = ("", "of", "D", name, *levels, "first d", "gap at first d", "√(first d/n)")
    return Table("", head, [_row(one) for one in several])


def _row(one: Measurement | Unmeasured) -> Sequence[str]:
    if isinstance(one, Unmeasured):
        return one.label, one.title, f"{one.D:,}", f"not measured: {one.reason}", *7 * (ABSENT,)
    measured = one.measured
    start = None if measured.start is None else sum(measured.start) / len(measured.start)
    known = (measured.mean_baseline, measured.crossing.threshold, start, measured.chance)
    scores = (ABSENT if level is None else f"{level:.4f}" for level in known)
    own = (one.label, one.about.title, f"{measured.D:,}", told(measured), *scores)
    if measured.gap is None or one.bound is None:
        return *own, ABSENT, ABSENT, ABSENT
    gap = f"{measured.gap:+.4f}".replace("-", "−") if one.about.metric == "accuracy" else ABSENT
    return *own, f"{measured.crossing.first:,}", gap, f"{one.bound:.4f}"


def comparison_results(several: Sequence[Measurement]) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    return {"sentences": comparison_sentences(several), "measurements": [one.to_dict() for one in several]}


def write_comparison(several: Sequence[Measurement], out: Path) -> Path:
    """Write results.json and report.html of measurements side by side into a folder; returns the page."""
    caption = (
        "A dot is the intrinsic dimension, a line its 95 % interval; where that is open, it ends with the d that were "
        "tried. An arrow: it is not within the d that were tried."
    )
    rows = [(dimension_by_row(several, "rows"), caption)] if any(one.found for one in several) else []
    write_whole(out / RESULTS, as_json(comparison_results(several)))
    title = f"Intrinsic dimension of {len(several)} measurements"
    lead = "How many directions training needs, side by side under one threshold."
    return _write_page(several, title, lead, comparison_sentences(several), rows, out)


def series_results(series: Sequence[Measurement | Unmeasured], title: str) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    said = series_sentences(series, title)
    return {"title": title, "sentences": said, "series": [one.to_dict() for one in series]}


def write_series(series: Sequence[Measurement | Unmeasured], title: str, axis: str, out: Path) -> Path:
    """Write a series' results.json and report.html into a folder; returns the page. axis: what its places are."""
    write_whole(out / RESULTS, as_json(series_results(series, title)))
    caption = (
        "Lines are 95 % intervals. A checkpoint without a point has no intrinsic dimension within the d tried, or was "
        "not measured."
    )
    lead = f"One downstream task, learned from each of {len(series)} checkpoints of one pretraining."
    figures, known = [], _measured(series)
    if any(one.found for one in known):
        figures = [(dimension_against(known, lambda one: one.at, axis, "series", joined=True), caption)]
    said = series_sentences(series, title)
    return _write_page(series, f"Intrinsic dimension along {title}", lead, said, figures, out)


def _write_page(
    several: Sequence[Measurement | Unmeasured],
    title: str,
    lead: str,
    said: list[str],
    figures: list[tuple[str, str]],
    out: Path,
) -> Path:
    import markupsafe

    known = _measured(several)
    rows = [(name.replace("_", " "), *values) for name, values in _entries(known).items()]
    shared = [(name, values[0]) for name, *values in rows if len(set(values)) == 1]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    context = {
        "title": title,
        "lead": lead,
        "sentences": said,
        "figures": [(markupsafe.Markup(image), caption) for image, caption in [*figures, *_relations(known)]],
        "heading": "Every measurement",
        "table": comparison_table(several),
        "differing": Table("", ("", *(one.label for one in known)), differing) if differing else None,
        "protocol": shared,
    }
    return write_whole(out / PAGE, filled("dimension.html", context, visible=wording.visible))


def _relations(several: Sequence[Measurement]) -> list[tuple[str, str]]:
    """d90 against what else is known of each: figures with captions, where there are two values or more."""
    found = [one for one in several if one.found]
    metrics = list(dict.fromkeys(one.about.metric for one in found))
    made = []
    if len({one.measured.D for one in found}) > 1:
        image = dimension_against(
            several, lambda one: one.measured.D, "all parameters, D", "parameters", logarithmic=True
        )
        made.append((image, "The intrinsic dimension against the number of parameters. Both scales are logarithmic."))
    if len({one.measured.mean_baseline for one in found}) > 1 and len(metrics) == 1:
        image = dimension_against(
            several, lambda one: one.measured.mean_baseline, f"{metrics[0]} of the baseline", "baseline"
        )
        made.append((image, "The intrinsic dimension against what training all parameters reaches."))
    gaps = [(one.label, one.bound, one.measured.gap) for one in several]
    known = [(label, bound, gap) for label, bound, gap in gaps if bound is not None and gap is not None]
    if known and {one.about.metric for one in several} == {"accuracy"}:
        made.append((gap_against_bound(known, "gap"), GAP_CAPTION))
    return made


def _entries(several: Sequence[Measurement]) -> dict[str, list[str]]:
    """How each was measured, as text by the name of the entry; ABSENT where one has no such entry."""
    each = [_told(one) for one in several]
    return {name: [own.get(name, ABSENT) for own in each] for name in dict.fromkeys(n for own in each for n in own)}


def _told(one: Measurement) -> Mapping[str, str]:
    plan, about = one.measured.plan, one.about
    own = {
        "metric": about.metric,
        "scored on": about.split,
        "training examples": about.n,
        "seeds": plan.seeds,
        **about.said,
        "multiples of lr tried": plan.rates,
    }
    return {name: wording.plain(value) for name, value in own.items()}
