"""The executor does what the simulator prices: no step is over before the simulator's, which has no overhead.

How close they are is a matter of time, which no test asserts; ``scripts/bench/replay.py`` prints it. Which of several ways
is the fastest is a matter of order: with tasks that wait out their prices it shows on two cores, for waiting needs none.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ranks import run_function

sys.path[:0] = [str(Path(__file__).parents[2] / "scripts" / "bench"), str(Path(__file__).parents[1] / "unit")]

import replay  # noqa: E402
from pricing import cluster, group, of_stages, profile, shape  # noqa: E402

from megatron_hetermoe.cost.tasks import TaskCosts  # noqa: E402
from megatron_hetermoe.planner.asym_ea import Limits, balance, placement_of  # noqa: E402
from megatron_hetermoe.runtime.replay import priced, replay as run_replay  # noqa: E402
from megatron_hetermoe.schedule.orders import build  # noqa: E402
from megatron_hetermoe.simulator.baselines import spread  # noqa: E402
from megatron_hetermoe.simulator.events import simulate, simulate_stages  # noqa: E402

SLOW = profile(shape(), (0.02, 0.04), (0.01, 0.02))
MARGIN = 1.2  # between one way and the next as simulated; what a machine does meanwhile changes all of them


def test_no_step_is_shorter_than_the_simulators():
    measured = [max(of_case) for of_case in zip(*run_function(run_replay, replay.RANKS, replay.cases(), timeout=200))]
    told = replay.predictions()
    assert len(measured) == len(told) == 12
    # A clock tick of slack: processes do not start a case in the same instant.
    assert all(real > simulated - 0.01 for real, simulated in zip(measured, told)), list(zip(measured, told))


def test_stages_hand_over_as_simulated():
    """Two stages of one attention and one expert rank: no step is over before the simulator's, and what a stage hands over
    keeps the next one from starting."""
    told, cases = [], []
    for bandwidth in (1e9, 5e5):  # a handover takes 16 us, or 33 ms
        on = cluster(1, 1, bandwidth=bandwidth)
        stages = of_stages(group(1, 1, shape(layers=2), microbatches=3, new=SLOW, old=SLOW, on=on), (1, 1), wave=1)
        cases.append(priced(*stages))
        told.append(simulate_stages(stages)[0].seconds)
    measured = [max(of_case) for of_case in zip(*run_function(run_replay, 4, cases, timeout=200))]
    assert all(real > simulated - 0.01 for real, simulated in zip(measured, told)), list(zip(measured, told))
    assert told[1] > told[0] and measured[1] > measured[0]


def test_the_executor_ranks_schedules_and_placements_as_the_simulator_does():
    """Naive disaggregation, zebra with experts on expert ranks only, zebra with the planner's placement."""
    of = shape(layers=2, experts=8)
    tokens = 2 * of.sequence * of.topk / of.experts
    unit = 0.02 * 64 / tokens  # seconds forward for 64 tokens, so that an expert rank has 80 ms for its four experts
    prices = profile(of, (0.04, 0.08), (unit, 2 * unit))
    costs = group(2, 2, of, microbatches=4, new=prices, old=prices, on=cluster(2, 2, bandwidth=1e9))
    even = spread(costs, [2, 3])
    moved = placement_of(balance(costs, Limits((10**6,) * 4), None).experts)
    assert moved != even
    cases, told = [], []
    for name, placement in (("sequential", even), ("zebra", even), ("zebra", moved)):
        schedule = build(name, of.layers, placement, 2, 4, None)
        cases.append(priced((schedule, TaskCosts(costs, placement))))
        told.append(simulate(schedule, TaskCosts(costs, placement)).seconds)
    assert told[0] > MARGIN * told[1] and told[1] > MARGIN * told[2], told
    naive, zebra, asymmetric = (max(of_case) for of_case in zip(*run_function(run_replay, 4, cases, timeout=200)))
    assert naive > zebra > asymmetric, (naive, zebra, asymmetric, told)
