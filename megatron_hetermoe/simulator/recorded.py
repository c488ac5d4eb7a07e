"""A recorded step in the simulator's terms, so that one summary describes both."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.schedule.interleaved import schedule_of
from megatron_hetermoe.schedule.numbering import Numbering
from megatron_hetermoe.schedule.tasks import Stream, Task
from megatron_hetermoe.schedule.trace import OPTIMIZER, REDUCE, STEP, Span
from megatron_hetermoe.simulator.events import MemberResult, Result
from megatron_hetermoe.topology.layout import Layout, layout_of
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
    numberings = [Numbering(plan.chunks_of_stage(stage)) for stage in range(layout.stages)]
    flowing = _flowing(spans, layout)
    times: dict[int, dict[Task | None, tuple[float, float]]] = {rank: {} for rank in range(layout.world_size)}
    queued: dict[int, dict[Task, tuple[float, float]]] = {rank: {} for rank in range(layout.world_size)}
    after: dict[tuple[int, str], tuple[float, float]] = {}
    for span in spans:
        if span.stream == STEP:
            after[span.rank, span.task] = span.start, span.end
        elif span.rank in times and (task := tasks[span.task]):
            since = flowing.get(_meeting(span, layout), span.start)
            own = numberings[layout.stage_of(span.rank)].in_stage(task)
            times[span.rank][own] = max(span.start, min(span.end, since)), span.end
            if span.queued:
                queued[span.rank][own] = span.queued
    seconds = max(span.end for span in spans)
    results = []
    for stage in range(layout.stages):
        schedule = schedule_of(plan, placement, layout.m, stage, microbatches)
        planned = [schedule.tasks_of(holder) for holder in range(layout.holders)]
        for ranks in layout.zp_groups()[stage * layout.groups:(stage + 1) * layout.groups]:
            for rank in ranks:
                if planned[layout.holder_of(rank)] != times[rank].keys():
                    raise UsageError([f"what rank {rank} recorded is not what plan.json has for {microbatches} microbatches: "
                                      f"the folder mixes runs; record one into an empty folder"])
            last = max(end for rank in ranks for _, end in times[rank].values())
            results.append(Result(schedule, tuple(
                MemberResult(times[rank], *(after.get((rank, name), (last, last)) for name in (REDUCE, OPTIMIZER)), queued[rank])
                for rank in ranks
            ), seconds))
    return results


def _meeting(span: Span, layout: Layout) -> tuple[Hashable, ...] | None:
    """What all ranks that take part in a transfer call it: those of a ZP group, or at one place of two stages. None for
    what is no transfer."""
    group = layout.group_of(span.rank)
    if span.stream == Stream.STAGES.value:
        return span.task, group % layout.groups, layout.member_of(span.rank)
    return (span.task, group) if span.stream in (Stream.OUT.value, Stream.BACK.value) else None


def _flowing(spans: Iterable[Span], layout: Layout) -> dict[tuple[Hashable, ...], float]:
    """For each transfer, since when all that take part were there: before, a rank waits for another, not for a link."""
    flowing: dict[tuple[Hashable, ...], float] = {}
    for span in spans:
        if span.rank < layout.world_size and (meeting := _meeting(span, layout)):
            flowing[meeting] = max(span.start, flowing.get(meeting, span.start))
    return flowing
