"""Ctrl-C and SIGTERM between two steps instead of within one, so that a checkpoint can be written."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger("trimtab")


class Wish:
    """Whether the user, or the scheduler of a cluster, has asked to stop."""

    to_stop = False


@contextmanager
def between_steps(active: bool) -> Iterator[Wish]:
    """Within: a first Ctrl-C or SIGTERM is noted, a second one stops at once. After: as before.

    Only where it would have stopped the program anyhow: in the main thread, under Python's own handler.
    """
    wish = Wish()
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before: dict[signal.Signals, Any] = {s: h for s, h in usual.items() if signal.getsignal(s) is h}
    if not (active and threading.current_thread() is threading.main_thread()):
        before = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        wish.to_stop = True
        again = "Ctrl-C again" if number == signal.SIGINT else "SIGTERM again"
        log.warning("stopping after this step, with a checkpoint; %s stops at once", again)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        restore()
