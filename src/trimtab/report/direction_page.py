"""`write_directions`: one measurement of directions as results.json, a file of tensors and one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.analyze.findings import Findings, Source
from trimtab.files import write_whole
from trimtab.report import direction_plots as plots
from trimtab.report import wording
from trimtab.report.direction_tables import overlap_tables, picks_table, sharing_table
from trimtab.report.template import check_plots, filled


def write_directions(findings: Findings, out: Path) -> Path:
    """Write results.json, projections.safetensors and report.html into a folder; returns the page.

    Raises UsageError when the extra "plots" is not installed; StorageError when the folder cannot be written.
    """
    write_whole(out / "projections.safetensors", projections(findings))
    write_whole(out / "results.json", json.dumps(findings.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return write_whole(out / "report.html", render(findings))


def projections(findings: Findings) -> bytes:
    """Every direction of every weight in safetensors: σᵢ [n] as PATH.sigma, cᵢ [n] of a source as NAME/PATH.along."""
    from safetensors.numpy import save

    tensors = {}
    for source in _sources(findings):
        for path, projected in source.projected.items():
            tensors[f"{path}.sigma"] = projected.sigma.astype(np.float32)
            tensors[f"{source.name}/{path}.along"] = projected.along.astype(np.float32)
    saved: bytes = save(tensors)
    return saved


def _sources(findings: Findings) -> list[Source]:
    return [*(one.source for one in findings.found), *([findings.reference] if findings.reference else [])]


def render(findings: Findings) -> str:
    """The page as text. The same findings give the same page, byte for byte."""
    check_plots()
    return filled("directions.html", _context(findings), visible=wording.visible)


def _context(findings: Findings) -> dict[str, Any]:
    s = findings.directions
    return {
        "title": f"Directions of {Path(findings.model).name}",
        "lead": _lead(findings),
        "sentences": findings.sentences(),
        "overlap_tables": overlap_tables(findings),
        "overlap_note": (
            f"Accuracy: the share of the {s} predicted directions that are among the {2 * s} of the reference that "
            f"change most. Recall: the share of its first {max(1, s // 2)} that are among the {s} predicted. "
            "± is the standard deviation of one weight's draws; the lift is over two random changes, with its 95% "
            "bootstrap interval over layers. Of ΔW = B A, two random changes have neither B nor A of the adapter; "
            "those that keep A, and the random prediction, have a random B beside its own A."
        ),
        "overlap_figures": _marked(_overlap_figures(findings)),
        "picks_note": (
            "Change rate: |uᵢᵀ ΔW vᵢ| / (σᵢ + ε). Dividing by σ makes noise itself stand out where σ is small, so each "
            "figure stands beside that of random changes, a random B beside the adapter's own A. "
            f"{s} smallest σ: the share of the {s} directions that are those; held: the share of all change rates they "
            "have."
        ),
        "picks_table": picks_table(findings),
        "rate_figures": _marked(_rate_figures(findings)),
        "sharing_table": sharing_table(findings),
        "sharing_figures": _marked(
            [
                (plots.sharing(pair, f"share{number}"), f"{pair.first} and {pair.second}: how often, over weights, "
                 "the direction of one rank in the first is that of one rank in the second.")
                for number, pair in enumerate(findings.pairs)
            ]
        ),
    }  # fmt: skip


def _marked(figures: Sequence[tuple[str, str]]) -> list[tuple[Any, str]]:
    import markupsafe

    return [(markupsafe.Markup(image), caption) for image, caption in figures]


def _lead(findings: Findings) -> str:
    names = ", ".join(f"{'step ' * findings.by_step}{one.source.name} ({one.source.folder})" for one in findings.found)
    against = f" against {findings.reference.name} ({findings.reference.folder})" if findings.reference else ""
    return (
        f"The {findings.directions} core directions of each weight that change most in {names}{against}; "
        f"{findings.draws} draws of random changes a weight, seed {findings.seed}."
    )


def _overlap_figures(findings: Findings) -> list[tuple[str, str]]:
    if findings.reference is None:
        return []
    figures: list[tuple[str, str]] = []
    if findings.by_step:
        caption = (
            "Overlap by training step. Dashed: two random changes, with the band that holds 95% of their means; "
            "dotted: the smallest σ as a prediction."
        )
        figures.append((plots.overlap_by_step(findings.found, "steps"), caption))
    last = findings.found[-1]
    caption = (
        f"{last.source.name}: accuracy by layer. The band holds 95% of what two random changes of one weight give."
    )
    return [*figures, (plots.overlap_by_layer(last.overlaps, "layers"), caption)]


def _rate_figures(findings: Findings) -> list[tuple[str, str]]:
    figures: list[tuple[str, str]] = []
    for source in _sources(findings)[len(findings.found) - 1 :]:
        for projected in plots.one_of_each_shape(source.projected):
            image = plots.change_rates(projected, findings.draws, findings.seed, f"rates{len(figures)}")
            caption = (
                f"{source.name}: {projected.path}. Grey bands and thin lines hold 95% of random changes of its size."
            )
            figures.append((image, caption))
    return figures
