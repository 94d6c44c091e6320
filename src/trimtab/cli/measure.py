"""What the measure commands share: the adapters and models they look at, and how they print tables."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.cli.common import Screen

SOURCES = "an adapter's folder, a run's, a checkpoint's, or a fine-tuned model's"


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
