"""The table of injected faults, printed when all tests have run."""

from __future__ import annotations

import pytest

_ROWS = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[_ROWS] = []


@pytest.fixture
def summary(request):
    """Takes (kind, role, moment, seconds from the fault to the last rank's end, what was said)."""
    return request.config.stash[_ROWS]


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(_ROWS, [])
    if rows:
        terminalreporter.section(f"{len(rows)} injected faults")
    for kind, role, moment, seconds, said in sorted(rows):
        terminalreporter.write_line(f"{kind:9}{role:10}{moment:15}{seconds:6.1f} s  {said}")
