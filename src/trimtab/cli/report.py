"""trimtab report: one self-contained page about a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trimtab.cli.common import Screen, options
from trimtab.errors import UsageError
from trimtab.options import option


@dataclasses.dataclass(frozen=True)
class ReportFlags:
    run: tuple[str, ...] = option(help="run folders", positional=True)
    out: str | None = option(None, "where the page goes; by default report.html in the run's folder")


def run(name: str, summary: str, argv: list[str]) -> None:
    """Write the page of each run named."""
    flags, output = options(ReportFlags, name, summary, argv)
    screen = Screen(output)
    from trimtab.report.page import write_report

    if flags.out and len(flags.run) > 1:
        raise UsageError("--out names one page, but there are several runs: leave it out")
    pages = []
    with screen.progress("drawing reports", "reports") as update:
        for folder in flags.run:
            pages.append(write_report(Path(folder), out=Path(flags.out) if flags.out else None))
            update(len(pages), len(flags.run))
    for page in pages:
        screen.outcome(f"report: {page}")
    screen.result({"report": [str(page) for page in pages]})
