"""One measurement of an intrinsic dimension: what it says, as JSON and as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.files import write_whole
from trimtab.report import wording
from trimtab.report.dimension_plots import accuracy_by_dimension
from trimtab.report.dimension_results import RESULTS, Told, as_json, result, sentences
from trimtab.report.direction_tables import Table
from trimtab.report.template import filled
from trimtab.subspace.measured import Measured

PAGE = "report.html"


def write_dimension(measured: Measured, about: Told, out: Path) -> Path:
    """Write results.json and report.html into a folder; returns the page."""
    write_whole(out / RESULTS, as_json(result(measured, about)))
    return write_whole(out / PAGE, render(measured, about))


def render(measured: Measured, about: Told) -> str:
    """The page as text. The same measurement gives the same page, byte for byte."""
    import markupsafe

    caption = (
        "Grey: one run each. The band is the interval of the intrinsic dimension, as far as d were tried; where there "
        "is no band, it was not found within them. The curve is the fit: the nearest means that do not fall, joined by "
        "logistic curves in log d."
    )
    context = {
        "title": f"Intrinsic dimension of {about.title}",
        "lead": f"How many directions training needs, tried in random subspaces of {measured.D:,} parameters.",
        "sentences": sentences(measured, about),
        "figures": [(markupsafe.Markup(accuracy_by_dimension(measured, about.metric, "accuracy")), caption)],
        "heading": "Every run",
        "table": score_table(measured),
        "differing": None,
        "protocol": [(name.replace("_", " "), wording.plain(value)) for name, value in about.said.items()],
    }
    return filled("dimension.html", context, visible=wording.visible)


def score_table(measured: Measured) -> Table:
    """A row of text for the baseline and every d."""
    rows = [_row("all parameters", measured.baseline, measured.baseline_rate)]
    rows += [_row(f"{d:,}", own, measured.rates[d]) for d, own in sorted(measured.scores.items())]
    return Table("", ("d", "mean", "each seed", "learning rate"), rows)


def _row(name: str, scores: Sequence[float], rate: float) -> Sequence[str]:
    return name, f"{sum(scores) / len(scores):.4f}", " ".join(f"{score:.4f}" for score in scores), f"{rate:.2g}"
