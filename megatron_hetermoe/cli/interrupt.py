"""SIGTERM ends a command as Ctrl-C does: what it was writing is removed."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


@contextlib.contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """Has SIGTERM raise SystemExit within, with the code that a shell gives it."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(EXIT_CODE)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
