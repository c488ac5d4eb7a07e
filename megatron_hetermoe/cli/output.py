"""The file that a command is asked to write: what keeps it from being written is said before there is anything to write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.plan import Plan


def check_output(flag: str, path: Path, problems: Problems) -> None:
    """Notes when a file cannot be made.

    Args:
        flag: that names it.
        path: of the file.
        problems: gets what is in the way.
    """
    if path.is_dir():
        problems.add(f"{flag} {path} is a folder: name a file")
    elif not path.parent.is_dir():
        problems.add(f"{flag} {path}: there is no folder {path.parent}: make it, or name another")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What writes a file goes inside.

    Raises:
        UsageError: with what the system says, if it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UsageError([f"cannot write {path}: {error.strerror or error}"]) from None


def write_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan file.

    Raises:
        UsageError: as ``writing``.
    """
    with writing(Path(path)):
        Path(path).write_text(plan.to_json(), encoding="utf-8")
