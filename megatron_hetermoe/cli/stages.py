"""What a long command is doing, on a terminal: one line that goes away when it is done."""

from __future__ import annotations

import sys
from types import TracebackType


class Stages:
    """A context manager; nothing is shown where the error output is no terminal."""

    def __enter__(self) -> Stages:
        self._progress = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._progress = Progress(SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
                                      console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("starting", total=None)
            self._progress.start()
        return self

    def enter(self, what: str) -> None:
        """Names what comes next."""
        if self._progress:
            self._progress.update(self._task, description=what, refresh=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()
