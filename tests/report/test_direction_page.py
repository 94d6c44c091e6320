"""The page about directions: whole, self-contained, with a null beside every figure."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from trimtab.analyze.directions import Projected
from trimtab.analyze.findings import Findings, Source, look_at, look_at_pairs
from trimtab.errors import UsageError
from trimtab.report import template
from trimtab.report.direction_page import render, write_directions
from trimtab.report.direction_plots import overlap_by_step
from trimtab.report.direction_tables import overlap_tables, picks_table, sharing_table
from trimtab.report.template import check_plots


def source(name: str, seed: int, step: int | None = None) -> Source:
    random = np.random.default_rng(seed)
    projected = {
        f"m.{layer}.{kind}": Projected(
            f"m.{layer}.{kind}", shape, 4, np.linspace(3, 0.5, 24), random.standard_normal(24)
        )
        for layer in range(3)
        for kind, shape in (("q", (24, 24)), ("k", (24, 40)), ("v", (24, 40)))
    }
    return Source(name, "folder", "adapter", projected, step)


@pytest.fixture(scope="module")
def findings() -> Findings:
    sources = [source("a <b>", 1), source("poet", 2)]
    reference = source("the reference", 3)
    found = [look_at(one, reference, directions=4) for one in sources]
    return Findings("tiny", 4, 100, 0, found, reference, look_at_pairs(sources, directions=4))


@pytest.fixture(scope="module")
def page(findings: Findings) -> str:
    return render(findings)


@pytest.fixture(scope="module")
def alone() -> Findings:
    """Without a reference, and so quick to draw."""
    return Findings("tiny", 4, 100, 0, [look_at(source("a", 1), None, directions=4)])


def by_step() -> Findings:
    reference = source("the reference", 3)
    found = [look_at(source(str(n), n, n), reference, directions=4) for n in (10, 20)]
    return Findings("tiny", 4, 100, 0, found, reference)


def test_the_page_is_self_contained(page: str, findings: Findings) -> None:
    assert "<script" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "a &lt;b&gt;" in page
    assert "a <b>" not in page
    for sentence in findings.sentences():
        assert sentence.replace("<", "&lt;").replace(">", "&gt;") in page


def test_every_figure_is_a_whole_drawing_with_a_text(page: str) -> None:
    # Accuracy by layer, change rates of the last adapter and of the reference in two shapes, one pair of tasks.
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 1 + 4 + 1
    for drawing in drawings:
        assert len(ElementTree.fromstring(drawing).attrib["aria-label"]) > 20
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_series_of_steps_is_drawn_over_the_steps(page: str) -> None:
    found = by_step()
    assert found.by_step
    drawing = overlap_by_step(found.found, "steps")
    assert "Overlap with the reference at 2 steps of training; at the last: 24×40 accuracy" in drawing
    assert "steps of training" not in page


def test_without_a_reference_the_picks_stand_alone(alone: Findings) -> None:
    page = render(alone)
    assert page == render(alone)
    assert 'id="overlap"' not in page
    assert overlap_tables(alone) == []
    assert [row[0] for row in picks_table(alone).rows] == ["24×40", "24×24"]


def test_no_figure_of_a_table_stands_without_its_nulls(findings: Findings) -> None:
    tables = overlap_tables(findings)
    assert [table.title for table in tables] == ["24×40", "24×24"]
    figures = findings.found[0].groups[0].accuracy
    first = tables[0].rows[0]
    assert first[0] == "a <b> accuracy"
    assert first[2] == f"{figures['random'].found:.2f}"
    assert first[3].startswith(f"{figures['random'].null:.2f} ± ")
    assert first[4].startswith(f"{figures['same_A'].null:.2f} ± ")
    assert first[7] == f"{8 / 24:.3f}"
    assert sharing_table(findings).rows[0][-1] == f"{4 / 24:.3f}"
    kinds = [row[0] for row in overlap_tables(Findings("tiny", 4, 100, 0, findings.found[:1]))[0].rows]
    assert kinds == ["accuracy", "k accuracy", "v accuracy", "recall", "k recall", "v recall"]


def test_the_folder_holds_the_results_and_the_page(tmp_path: Path, alone: Findings) -> None:
    page = write_directions(alone, tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert told == json.loads(json.dumps(alone.to_dict()))


def test_what_the_page_needs_is_told_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install \"trimtab\[plots\]\""):
        check_plots()
