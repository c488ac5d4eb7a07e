"""Stretched tasks wait for what they took by themselves, so many times over."""

from __future__ import annotations

from types import SimpleNamespace

from models import tiny
from ranks import run_ranks

from megatron_hetermoe.runtime import stretch
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task


def test_a_task_waits_by_its_own_time(monkeypatch):
    """Each task takes two seconds of a clock that only tasks move."""
    clock, slept = [0.0], []
    monkeypatch.setattr(stretch, "time", SimpleNamespace(thread_time=lambda: clock[0], sleep=slept.append))

    def work(task: Task) -> None:
        clock[0] += 2.0

    table = dict.fromkeys([(kind, direction) for kind in Kind for direction in Pass], work)
    slow = stretch.stretched(table, {Kind.ATTENTION: 3.0, Kind.EXPERT: 1.0})
    for kind in Kind:
        for direction in Pass:
            slow[kind, direction](Task(kind, direction, 1, 0))
    assert slept == [4.0] * len(Pass) and clock[0] == 2.0 * len(table)  # all passes of A, and no other


def test_a_run_with_slow_tasks_trains_as_any(tmp_path):
    flags = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1", *tiny(train_iters=2)]
    plain, slow = (run_ranks([*flags, *more], 2, cwd=tmp_path).check() for more in (
        (), ("--hetermoe-slow-down", "expert=2,attention-on-expert=4")))
    assert [step.loss for step in plain.steps[0]] == [step.loss for step in slow.steps[0]]
    assert "expert ranks have no attention tasks" in slow.output[0]
