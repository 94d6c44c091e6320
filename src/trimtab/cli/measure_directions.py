"""trimtab measure directions: which core directions of the frozen weights change, beside what noise gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.answering import ANY_BASE, named_adapters
from trimtab.cli.common import ModelName, Screen, load_libraries, load_model, options, refuse_taken
from trimtab.cli.measure import SOURCES, show_table
from trimtab.errors import UsageError
from trimtab.models.steps import steps_of
from trimtab.options import option

if TYPE_CHECKING:
    from trimtab.analyze.findings import Findings, Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionsFlags(ModelName):
    adapter: tuple[str, ...] = option(
        help=f"{SOURCES}, each as DIR, NAME=DIR or STEP=DIR; several are compared, by step or pairwise"
    )
    reference: str | None = option(None, f"whose directions are to be predicted: {SOURCES}")
    directions: int = option(8, "s, the directions of each weight that are looked at")
    draws: int = option(100, "random changes of each weight that a null is made of")
    seed: int = option(0, "of the random changes", least=0)
    any_base: bool = option(False, ANY_BASE)
    out: str | None = option(None, "folder for results.json, projections.safetensors and the page report.html")


def run(name: str, summary: str, argv: list[str]) -> None:
    """Project every change on the core directions, compare, print, and write the page."""
    flags, output = options(DirectionsFlags, name, summary, argv)
    given = named_adapters(flags.adapter)
    if flags.reference is not None and not Path(flags.reference).is_dir():
        raise UsageError(f"reference: there is no folder {flags.reference}")
    if flags.out is not None:
        refuse_taken(flags.out)
    screen = Screen(output)
    load_libraries(screen)
    from trimtab.analyze.lifts import check_draws
    from trimtab.report.direction_page import write_directions
    from trimtab.report.template import check_plots

    check_draws(flags.draws)
    if flags.out is not None:
        check_plots()
    loaded = load_model(flags, screen)
    findings = _findings(flags, given, loaded, screen)
    _show(findings, screen)
    result = findings.to_dict()
    if flags.out is not None:
        with screen.progress("drawing the page"):
            page = write_directions(findings, Path(flags.out))
        screen.outcome(f"report: {page}")
        result["report"] = str(page)
    screen.result(result)


def _findings(flags: DirectionsFlags, given: dict[str, str], loaded: Any, screen: Screen) -> Findings:
    from trimtab.analyze.findings import Findings, look_at, look_at_pairs

    steps = steps_of(list(given))
    names = sorted(given, key=lambda name: steps.get(name, 0))
    sources = [_source(name, given[name], flags, loaded.model, screen, steps.get(name)) for name in names]
    reference = None
    if flags.reference is not None:
        paths = dict.fromkeys(path for source in sources for path in source.projected)
        reference = _source("the reference", flags.reference, flags, loaded.model, screen, paths=paths)
    limits = (flags.directions, flags.draws, flags.seed)
    with screen.progress("comparing", "weights") as update:
        found = [look_at(source, reference, *limits, progress=update) for source in sources]
        pairs = look_at_pairs(sources, *limits, progress=update) if not steps else []
    return Findings(loaded.name, *limits, found, reference, pairs)


def _source(
    name: str,
    folder: str,
    flags: DirectionsFlags,
    model: Any,
    screen: Screen,
    step: int | None = None,
    paths: Iterable[str] | None = None,
) -> Source:
    """One folder's changes along the core directions. paths: of a reference, the weights that matter."""
    from trimtab.analyze.changes import aligned, kind_of, read_changes
    from trimtab.analyze.directions import check_directions, project_all
    from trimtab.analyze.findings import Source
    from trimtab.deltas.core_bases import prepare

    with read_changes(Path(folder), model, any_base=flags.any_base, paths=paths) as changes:
        if paths is not None:
            changes = _of_reference(changes, aligned(changes, paths), list(paths), screen)
        check_directions(flags.directions, changes, compared=flags.reference is not None)
        with screen.progress("decomposing", "weights") as update:
            prepare([changed.weight for changed in changes], update)
        with screen.progress(f"projecting {name}", "weights") as update:
            projected = project_all(changes, update)
    return Source(name, folder, kind_of(Path(folder)), projected, step)


def _of_reference(changes: Sequence[Any], fitting: list[Any], paths: list[str], screen: Screen) -> list[Any]:
    """Those changes of the reference that can be compared; what cannot is told."""
    if not fitting:
        raise UsageError(
            f"the reference changes none of the {len(paths)} weights, such as {paths[0]}; it changes "
            f"{changes[0].path if changes else 'nothing'}"
        )
    if len(fitting) < len(paths):
        known = {changed.path for changed in fitting}
        first = next(path for path in paths if path not in known)
        screen.warn(
            f"the reference does not change {len(paths) - len(fitting)} of {len(paths)} weights, such as {first}"
        )
    return fitting


def _show(findings: Findings, screen: Screen) -> None:
    from trimtab.report.direction_tables import overlap_tables, picks_table, sharing_table

    tables = overlap_tables(findings) or [picks_table(findings)]
    for table in [*tables, *([sharing_table(findings)] if findings.pairs else [])]:
        show_table(screen, table.title, table.head, table.rows)
    for sentence in findings.sentences():
        screen.outcome(sentence)
