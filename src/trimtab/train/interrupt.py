"""Ctrl-C between two steps instead of within one, so that a checkpoint can be written."""

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
    """Whether the user has pressed Ctrl-C."""

    to_stop = False


@contextmanager
def between_steps(active: bool) -> Iterator[Wish]:
    """Within: a first Ctrl-C is noted, a second one stops at once. After: as before.

    Only where Ctrl-C would have stopped the program anyhow: in the main thread, under Python's own handler.
    """
    wish = Wish()
    before: Any = signal.getsignal(signal.SIGINT)
    usual = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if not (active and usual):
        yield wish
        return

    def note(number: int, frame: FrameType | None) -> None:
        wish.to_stop = True
        log.warning("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGINT, before)
