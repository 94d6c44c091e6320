"""Figures about directions as tables of text, for the page and the terminal: never a figure without its null."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.analyze.findings import Findings, Found
from trimtab.analyze.lifts import Against
from trimtab.analyze.overlap import NULLS, Group


@dataclass(frozen=True)
class Table:
    """Rows of text; the first cell of a row is its name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


OVERLAP_HEAD = ("", "weights", "found", "two random", "keeping A", "random prediction", "smallest σ", "chance", "lift")


def overlap_tables(findings: Findings) -> list[Table]:
    """The scores beside their nulls, a table for each shape; kinds of weights by themselves where one source is
    looked at."""
    tables = []
    for label in dict.fromkeys(group.label for one in findings.found for group in one.groups):
        rows = []
        for one in findings.found:
            rows += _group_rows(one, label, findings)
        tables.append(Table(label, OVERLAP_HEAD, rows))
    return tables


def _group_rows(one: Found, label: str, findings: Findings) -> list[list[str]]:
    several = len(findings.found) > 1
    rows = []
    own = [group for group in one.groups if group.label == label]
    kinds = [] if several else [group for group in one.kinds if group.label.startswith(f"{label} ")]
    for score in ("accuracy", "recall"):
        for group in own + kinds:
            name = f"{one.source.name} " if several else f"{group.label.removeprefix(label).strip()} "
            rows.append([f"{name}{score}".strip(), str(group.weights), *_cells(group, score)])
    return rows


def _cells(group: Group, score: str) -> list[str]:
    figures: dict[str, Against] = getattr(group, score)
    random = figures["random"]
    return [
        f"{random.found:.2f}", *(_null(figures[null]) for null in NULLS),
        f"{random.lift:+.2f} {interval(random)}",
    ]  # fmt: skip


def _null(figure: Against) -> str:
    return f"{figure.null:.2f} ± {figure.spread:.2f}" if figure.spread else f"{figure.null:.3f}"


def interval(figure: Against) -> str:
    """The interval of a lift, signs shown."""
    return f"[{figure.interval.low:+.2f}, {figure.interval.high:+.2f}]"


def picks_table(findings: Findings) -> Table:
    """Where the picked directions stand and how much of all change rates they hold, by source and shape."""
    head = ("", f"{findings.directions} smallest σ", "random changes", "lift", "held", "random changes", "lift")
    rows = []
    for one in findings.found:
        for label, figures in one.picked.items():
            name = f"{one.source.name}, {label}" if len(findings.found) > 1 else label
            rows.append([name, *_against_cells(figures["smallest"]), *_against_cells(figures["held"])])
    return Table("", head, rows)


def _against_cells(figure: Against) -> list[str]:
    return [
        f"{figure.found:.2f}", f"{figure.null:.2f} ± {figure.spread:.2f}", f"{figure.lift:+.2f} {interval(figure)}"
    ]  # fmt: skip


def sharing_table(findings: Findings) -> Table:
    """What every two sources share, by shape."""
    head = ("", "weights", "shared", "random changes", "lift", "random picks")
    rows = [
        [f"{pair.first} and {pair.second}, {shape.label}", str(shape.weights), *_against_cells(shape.share),
         f"{shape.chance:.3f}"]
        for pair in findings.pairs
        for shape in pair.shapes
    ]  # fmt: skip
    return Table("", head, rows)
