"""How far long work is, drawn on a terminal. Imports rich, so it is imported late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console
from rich.text import Text


class _Count(bars.MofNCompleteColumn):
    """3/10; where there is no total 3 runs, and nothing before the first."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: bars.Task) -> Text:
        if task.total is not None:
            return super().render(task)
        return Text(f"{task.completed:,.0f} {self.unit}" if task.completed else "")


class _Pace(bars.ProgressColumn):
    """The rate, or the time one takes when that is over a second; the seconds so far where there is no total."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: bars.Task) -> Text:
        if task.total is None:
            return Text(f"{task.elapsed or 0:.0f} s")
        speed = task.finished_speed or task.speed
        if not speed:
            return Text()
        return Text(f"{speed:.1f} {self.unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{self.unit.removesuffix('s')}")


class _Left(bars.TimeRemainingColumn):
    """The time left; nothing where there is no total."""

    def render(self, task: bars.Task) -> Text:
        return Text() if task.total is None else Text("ETA ") + super().render(task)


@contextmanager
def drawn(console: Console, what: str, unit: str) -> Iterator[tuple[bars.Progress, bars.TaskID]]:
    """One bar with its task. It stays when there was a total, and vanishes at the end when there was none."""
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), _Count(unit), _Pace(unit), _Left())
    # Averaged over minutes: steps may take many seconds, and differ, for batches differ in length.
    with bars.Progress(*columns, console=console, speed_estimate_period=300.0) as bar:
        task = bar.add_task(what, total=None)
        try:
            yield bar, task
        finally:
            bar.live.transient = bar.tasks[0].total is None
