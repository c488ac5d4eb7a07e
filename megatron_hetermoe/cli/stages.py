"""What a long command is doing, on a terminal: one line that goes away when it is done."""

from __future__ import annotations

import sys
from types import TracebackType


class Stages:
    """A context manager; nothing is shown where the error output is no terminal."""

    def __enter__(self) -> Stages:
        self._status = None
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()
        return self

    def enter(self, what: str) -> None:
        """Names what comes next."""
        if self._status:
            self._status.update(what)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()
