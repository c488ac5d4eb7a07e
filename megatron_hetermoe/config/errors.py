"""One error for everything that is wrong with what the user said."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator

EXIT_CODE = 2  # of every command and every rank that refuses its input
OWN_LOG = "HETERMOE_OWN_LOG"  # in the environment of ranks whose output each goes to a file of its own
PEER_LOST_CODE = 3  # of a rank that ends because another one died, failed or stopped


class UsageError(ValueError):
    """The user's input cannot be run. Carries every problem that was found, not the first one.

    Args:
        problems: one sentence a problem, each naming what is wrong and the way out.
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        assert self.problems, "a UsageError without a problem"
        super().__init__("\n".join(self.problems))

    def message(self) -> str:
        """The text for the user: a head line and a line for each problem."""
        count = len(self.problems)
        head = "hetermoe: 1 problem:" if count == 1 else f"hetermoe: {count} problems:"
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems)])


class Problems:
    """Collects problems while input is checked, so that one message can name them all."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def add(self, problem: str) -> None:
        """Notes a problem; the same sentence is kept once."""
        if problem not in self._problems:
            self._problems.append(problem)

    def extend(self, error: UsageError) -> None:
        """Takes over what another check found."""
        for problem in error.problems:
            self.add(problem)

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """Notes what a check inside raises, and goes on."""
        try:
            yield
        except UsageError as error:
            self.extend(error)

    def __bool__(self) -> bool:
        return bool(self._problems)

    def __len__(self) -> int:
        return len(self._problems)

    def raise_if_any(self) -> None:
        """Raises UsageError with all that was noted, if anything was."""
        if self._problems:
            raise UsageError(self._problems)


def tell(error: UsageError) -> int:
    """Says on a rank what is wrong, and returns its exit code. All ranks find the same, so one a machine says it, unless
    each has a file for what it says: then whoever ends first has said it."""
    if os.environ.get(OWN_LOG) or os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        print(error.message(), file=sys.stderr, flush=True)
    return EXIT_CODE
