"""What the measure commands share: the adapters and models they look at, and how they print tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from trimtab.cli.common import Screen

SOURCES = "an adapter's folder, a run's, a checkpoint's, or a fine-tuned model's"


def steps_of(names: Sequence[str]) -> Mapping[str, int]:
    """The step of training that each name tells: 200, step200 or step-000200; empty unless all do."""
    found = {name: re.fullmatch(r"(?:step-?)?(\d+)", name) for name in names}
    return {name: int(match[1]) for name, match in found.items() if match} if all(found.values()) else {}


def show_table(screen: Screen, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for a person; nothing where --json or --quiet is given."""
    if screen.output.json or screen.output.quiet:
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", title=title or None, title_justify="left")
    for number, word in enumerate(head):
        table.add_column(word, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    screen.console.print(table)
    screen.console.print()
