"""The table of injected faults, printed when all tests have run; all of them: ``pytest -m '' tests/faults``."""

from __future__ import annotations

from collections import Counter

import pytest
from ranks import RanksFailed

_ROWS, _FAILED = pytest.StashKey[list](), pytest.StashKey[Counter]()
_HANG, _RESUME, _CULPRIT = "hangs", "wrong resumes", "unnamed culprits or other failures"


def pytest_configure(config):
    config.stash[_ROWS] = []
    config.stash[_FAILED] = Counter()


@pytest.fixture
def summary(request):
    """Takes (kind, role, moment, seconds from the fault to the last rank's end, what was said)."""
    return request.config.stash[_ROWS]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Sorts what failed by what it means."""
    report = yield
    if call.excinfo and not report.skipped and "summary" in item.fixturenames:
        frames = {entry.name for entry in call.excinfo.traceback}
        is_hang = call.excinfo.errisinstance(RanksFailed) and "still running" in str(call.excinfo.value)
        meaning = _HANG if is_hang else _RESUME if "assert_same_steps" in frames else _CULPRIT
        item.config.stash[_FAILED][meaning] += 1
    return report


def pytest_terminal_summary(terminalreporter, config):
    rows, failed = config.stash.get(_ROWS, []), config.stash.get(_FAILED, Counter())
    if not rows and not failed:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"{len(rows) + failed.total()} injected faults")
    counts = Counter((kind, role, moment) for kind, role, moment, _, _ in rows)
    slowest: dict[tuple[str, str], float] = {}
    for kind, role, _, seconds, _ in rows:
        slowest[kind, role] = max(seconds, slowest.get((kind, role), 0.0))
    for kind, role in sorted(slowest):
        moments = ", ".join(f"{moment} {count}" for (one, other, moment), count in sorted(counts.items())
                            if (one, other) == (kind, role))
        write(f"{kind:9}{role:10}slowest end {slowest[kind, role]:5.1f} s   {moments}")
    if terminalreporter.verbosity > 0:
        for kind, role, moment, seconds, said in sorted(rows):
            write(f"{kind:9}{role:10}{moment:15}{seconds:6.1f} s  {said}")
    write(f"{len(rows)} as they should be; " + ", ".join(f"{failed[one]} {one}" for one in (_HANG, _RESUME, _CULPRIT))
          + f"; the slowest end {max(slowest.values(), default=0.0):.1f} s after the fault")
