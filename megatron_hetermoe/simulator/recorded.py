"""A recorded step in the simulator's terms, so that one summary describes both."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.schedule.orders import build
from megatron_hetermoe.schedule.tasks import Stream, Task
from megatron_hetermoe.schedule.trace import OPTIMIZER, REDUCE, STEP, Span
from megatron_hetermoe.simulator.events import MemberResult, Result
from megatron_hetermoe.topology.layout import layout_of
from megatron_hetermoe.topology.placement import Placement


def from_start(spans: Iterable[Span]) -> list[Span]:
    """The spans in seconds since the first one's start."""
    spans = list(spans)
    start = min(span.start for span in spans)
    return [span.moved(-start) for span in spans]


def results_of(spans: Iterable[Span], plan: Plan) -> list[Result]:
    """Each ZP group's step.

    Args:
        spans: of all ranks, in seconds since the start of the step.
        plan: of the recorded run.

    Raises:
        UsageError: the tasks are not those of the plan.
    """
    spans = list(spans)
    layout = layout_of(plan)
    tasks = {name: Task.parse(name) for name in {span.task for span in spans}}
    microbatches = 1 + max((task.microbatch for task in tasks.values() if task), default=0)
    placement = Placement(plan.placement, layout.holders)
    schedule = build(
        plan.schedule, plan.model.layers, placement, layout.m, microbatches, plan.wave,
        weight_gradients=plan.weight_gradients,
    )
    times: dict[int, dict[Task, tuple[float, float]]] = {rank: {} for rank in range(layout.world_size)}
    after: dict[tuple[int, str], tuple[float, float]] = {}
    for span in spans:
        if span.stream == STEP:
            after[span.rank, span.task] = span.start, span.end
        elif span.rank in times and tasks[span.task]:
            times[span.rank][tasks[span.task]] = span.start, span.end
    seconds = max(span.end for span in spans)
    planned = [schedule.tasks_of(holder) for holder in range(layout.holders)]
    results = []
    for ranks in layout.zp_groups():
        flowing = _flowing([times[rank] for rank in ranks])
        for rank in ranks:
            if planned[layout.holder_of(rank)] != times[rank].keys():
                raise UsageError([f"what rank {rank} recorded is not what plan.json has for {microbatches} microbatches: "
                                  f"the folder mixes runs; record one into an empty folder"])
        last = max(end for rank in ranks for _, end in times[rank].values())
        results.append(Result(schedule, tuple(
            MemberResult(
                {task: (max(start, min(end, flowing.get(task, start))), end)
                 for task, (start, end) in times[rank].items()},
                *(after.get((rank, name), (last, last)) for name in (REDUCE, OPTIMIZER)),
            )
            for rank in ranks
        ), seconds))
    return results


def _flowing(members: list[dict[Task, tuple[float, float]]]) -> dict[Task, float]:
    """For each transfer, since when all that take part were there: before, a rank waits for another, not for a link."""
    flowing: dict[Task, float] = {}
    for times in members:
        for task, (start, _) in times.items():
            if task.stream is not Stream.COMPUTE:
                flowing[task] = max(start, flowing.get(task, start))
    return flowing
