"""TERM and HUP end a command as Ctrl-C does: what it started is ended, and what it was writing is removed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import NoReturn

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Has TERM and HUP raise SystemExit within, with the code that a shell gives them. One that is ignored stays so: under
    nohup a command outlives its terminal."""
    ending = (signal.SIGTERM, signal.SIGHUP)
    return handling({number: _leave for number in ending if signal.getsignal(number) is not signal.SIG_IGN})


@contextlib.contextmanager
def handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Has signals handled so within, and afterwards as before. For the main thread."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
