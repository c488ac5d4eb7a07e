"""What a long command shows on a terminal while it works, and takes away when it is done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import TracebackType


class Activity:
    """One line that says what is being done. A context manager; nothing is shown where the error output is no terminal."""

    def __enter__(self) -> Activity:
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


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A bar, which begins when it is told how much there is to do; nothing is shown where the output is no terminal.

    Yields:
        What takes the work in a word and its bytes, and gives what takes the bytes that are done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # the stream of now, since what libraries print meanwhile is kept away
    with Progress(*columns, console=Console(file=sys.stdout), transient=True,
                  disable=not sys.stdout.isatty()) as progress:

        def begin(what: str, size: int) -> Callable[[int], None]:
            task = progress.add_task(what, total=size)
            return lambda count: progress.advance(task, count)

        yield begin
