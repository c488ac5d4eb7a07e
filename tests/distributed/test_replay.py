"""The executor does what the simulator prices: no step is over before the simulator's, which has no overhead.

How close they are is a matter of time, which no test asserts; ``scripts/bench/replay.py`` prints it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ranks import run_function

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import replay  # noqa: E402


def test_no_step_is_shorter_than_the_simulators():
    measured = [max(of_case) for of_case in zip(*run_function(replay.run_cases, replay.RANKS, timeout=200))]
    told = replay.predictions()
    assert len(measured) == len(told) == 12
    # A clock tick of slack: processes do not start a case in the same instant.
    assert all(real > simulated - 0.01 for real, simulated in zip(measured, told)), list(zip(measured, told))
