"""How far long work is, where no terminal could draw it: a line now and then, for a log file."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_SECONDS = 10.0
"""After so long the first line is told: short work needs none."""
EVERY_SECONDS = 60.0


class PlainLines:
    """Called with how far the work is, it says so after ten seconds and then once a minute.

    The rate is of the time since the first call, so that what an earlier session did is not counted in.
    """

    def __init__(self, what: str, unit: str, tell: Callable[[str], None]) -> None:
        self._what, self._unit, self._tell = what, unit, tell
        self._start: tuple[float, float] | None = None
        self._due = time.monotonic() + FIRST_SECONDS

    def __call__(self, done: float, total: int | None, note: str = "") -> None:
        """Note that `done` of `total` is reached, and tell it when a line is due."""
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
        if now < self._due:
            return
        self._due = now + EVERY_SECONDS
        seconds, more = now - self._start[0], done - self._start[1]
        pace = left = ""
        if more > 0 < seconds:
            pace = f", {_pace(more / seconds, self._unit)}"
            left = f", ETA {_clock((total - done) * seconds / more)}" if total is not None else ""
        of = f" of {total:,}" if total is not None else ""
        unit = self._unit.removesuffix("s") if done == 1 and total is None else self._unit
        self._tell(f"{self._what}{note}: {done:,.0f}{of} {unit}{pace}{left}")


def _pace(rate: float, unit: str) -> str:
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit.removesuffix('s')}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
