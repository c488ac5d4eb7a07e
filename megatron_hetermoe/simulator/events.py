"""Discrete events over a schedule: the second driver of what the executor runs.

Each member has the streams that it has in ``runtime.executor``: a task starts when it heads its stream and all that
``MemberSchedule.waits`` names for it is done. A transfer starts when that holds for every member that takes part and
ends for all at once. All attention members take part in each, so a channel carries one at a time; two on opposite
channels share the links of a member that both sends and receives in both, and slow down together. What pipeline stages
hand over starts when both ranks have come to it. Where queueing tasks costs a host something, none starts before its member's
host has queued it (``simulator.queueing``).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from megatron_hetermoe.cost.tasks import TaskCosts, Transfer
from megatron_hetermoe.schedule.orders import MemberSchedule, Schedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.schedule.trace import OPTIMIZER, REDUCE, STEP, Span
from megatron_hetermoe.simulator.queueing import HostQueue

_CHANNELS = (Stream.OUT, Stream.BACK)


@dataclass(frozen=True)
class MemberResult:
    """What one member did, in seconds since the start of the step.

    Attributes:
        times: for each of its tasks, start and end.
        reduced: start and end of its gradient reduction.
        stepped: start and end of its optimizer step.
        queued: for each task, of a recorded step each compute task, when its host began and ended to queue it; empty where that is
            not counted.
    """

    times: dict[Task, tuple[float, float]]
    reduced: tuple[float, float]
    stepped: tuple[float, float]
    queued: dict[Task, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One step of one ZP group.

    Attributes:
        schedule: what was run.
        members: by member. Members that cannot differ share one MemberResult.
        seconds: the step, with reduction and optimizer.
    """

    schedule: Schedule
    members: tuple[MemberResult, ...]
    seconds: float

    def spans(
        self, rank_of: Callable[[int], int], costs: TaskCosts, holder_of: Callable[[int], int] = lambda member: member,
        in_model: Callable[[Task], Task] = lambda task: task,
    ) -> list[Span]:
        """The step as a trace.

        Args:
            rank_of: global rank of a member.
            costs: that were simulated.
            holder_of: the member that it is in these.
            in_model: a task with the model's number for its layer (``schedule.numbering``).
        """
        spans = []
        for member, result in enumerate(self.members):
            rank, holder = rank_of(member), holder_of(member)
            spans += [
                Span(rank, task.stream.value, str(in_model(task)), *times, costs.sent(holder, task),
                     costs.received(holder, task), result.queued.get(task) if task.stream is Stream.COMPUTE else None)
                for task, times in result.times.items()
            ]
            for name, (start, end) in ((REDUCE, result.reduced), (OPTIMIZER, result.stepped)):
                if end > start:
                    spans.append(Span(rank, STEP, name, start, end))
        return sorted(spans, key=lambda span: (span.rank, span.start, span.stream))


def simulate(schedule: Schedule, costs: TaskCosts) -> Result:
    """One step of one ZP group; identical groups do the same at the same time.

    Args:
        schedule: its tasks and their orders.
        costs: the price of each, for the schedule's placement and with W tasks where it has them.
    """
    return simulate_stages([(schedule, costs)])[0]


def simulate_stages(stages: Sequence[tuple[Schedule, TaskCosts]]) -> tuple[Result, ...]:
    """One step of one ZP group in each pipeline stage, with what they hand over.

    Args:
        stages: for each, its schedule and costs, as of ``simulate``.
    """
    assert all(schedule.placement == costs.placement and schedule.weight_gradients == costs.weight_gradients
               for schedule, costs in stages)
    alike = members_alike(stages)
    tracks = [(stage, members[0]) for stage in range(len(stages)) for members in alike]
    run = _Run(stages, tracks)
    run.go()
    reduced = {}
    for track, (stage, member) in enumerate(tracks):
        schedule, costs = stages[stage]
        end = max((times[1] for times in run.times[track].values()), default=0.0)
        reduced[track] = (end, end + (0.0 if schedule.forward_only else costs.reduction(member)))
    # The norm of all gradients is known when the last rank has reduced its own, and nobody steps before.
    norm = max(end for _, end in reduced.values())
    found: list[dict[int, MemberResult]] = [{} for _ in stages]
    for track, (stage, member) in enumerate(tracks):
        schedule, costs = stages[stage]
        step = 0.0 if schedule.forward_only else costs.optimizer(member)
        result = MemberResult(run.times[track], reduced[track], (norm, norm + step), run.queued(track))
        found[stage].update(dict.fromkeys(alike[track % len(alike)], result))
    seconds = max(result.stepped[1] for members in found for result in members.values())
    return tuple(
        Result(schedule, tuple(members[member] for member in range(schedule.placement.members)), seconds)
        for (schedule, _), members in zip(stages, found)
    )


def members_alike(stages: Sequence[tuple[Schedule, TaskCosts]]) -> list[list[int]]:
    """The members, put together where role, pool and number of experts in every layer of every stage are the same: all
    that a task's price and a member's order depend on, so these do the same at the same time."""
    alike: dict[tuple, list[int]] = {}
    schedule, costs = stages[0]
    held = [counts for of, prices in stages for layer in range(1, of.layers + 1) if (counts := prices.experts(layer))]
    for member, seat in enumerate(costs.group.seats):
        key = (member < schedule.attention_members, seat.pool.name, tuple(counts[member] for counts in held))
        alike.setdefault(key, []).append(member)
    return list(alike.values())


@dataclass
class _Active:
    """A transfer on its way: what is left of it, as a share, since when at what pace."""

    task: Task
    price: Transfer
    start: float
    left: float
    since: float
    pace: float  # shares a second
    version: int = 0  # of its pace; an end that was expected at an older one does not count


_Channel = tuple[int, Stream]  # of a stage
_Handover = tuple[int, int, Pass, int]  # part of the model before it, member, pass, microbatch


class _Run:
    """The state of one simulation.

    Args:
        stages: schedules and costs.
        tracks: stage and member of whatever does its tasks by itself.
    """

    def __init__(self, stages: Sequence[tuple[Schedule, TaskCosts]], tracks: Sequence[tuple[int, int]]):
        self.times: list[dict[Task, tuple[float, float]]] = [{} for _ in tracks]
        self._tracks = tracks
        self._costs = [stages[stage][1] for stage, _ in tracks]
        self._schedules = [schedule for schedule, _ in stages]
        self._orders: list[MemberSchedule] = [stages[stage][0].member(member) for stage, member in tracks]
        self._next = {(track, stream): 0 for track, orders in enumerate(self._orders) for stream in orders.streams}
        self._busy: set[tuple[int, Stream]] = set()  # also with a transfer that others have not come to
        self._parts: dict[tuple[int, Task], list[int]] = {}
        for track, (stage, _) in enumerate(tracks):
            for stream in _CHANNELS:
                for task in self._orders[track].streams[stream]:
                    self._parts.setdefault((stage, task), []).append(track)
        has_hosts = any(costs.group.has_host for _, costs in stages)
        self._hosts = [HostQueue(orders, partial(self._knows_sizes, stage))
                       for orders, (stage, _) in zip(self._orders, tracks)] if has_hosts else []
        self._computed: Counter[tuple[int, Task]] = Counter()  # tracks that have done an A task forward
        self._owners = sum(stage == 0 and member < stages[0][0].attention_members for stage, member in tracks)
        self._arrived: dict[tuple[int, Task], int] = {}
        self._met: dict[_Handover, tuple[int, Task]] = {}  # who has come to it first
        self._active: dict[_Channel, _Active] = {}
        self._events: list[tuple[float, int, Callable[..., None], tuple]] = []
        self._number = 0  # of events, so that equal times keep the order in which they were made

    def go(self) -> None:
        """Runs until nothing is left.

        Raises:
            AssertionError: when tasks are left that can never start; ``schedule.checks`` proves that none are.
        """
        for track in range(len(self._tracks)):
            self._try_all(track, 0.0)
        for track in range(len(self._hosts)):
            self._queue(track, 0.0)
        while self._events:
            now, _, finish, what = heapq.heappop(self._events)
            finish(*what, now)
        left = [(track, self._orders[track].streams[stream][at]) for (track, stream), at in self._next.items()
                if at < len(self._orders[track].streams[stream])]
        assert not left, f"stuck before {left[0][1]} on member {self._tracks[left[0][0]]}"

    def queued(self, track: int) -> dict[Task, tuple[float, float]]:
        """When the host queued each task; empty where hosts are not counted."""
        return self._hosts[track].queued if self._hosts else {}

    def _knows_sizes(self, stage: int, dispatch: Task) -> bool:
        """Whether all owners have computed what a dispatch carries."""
        return self._computed[stage, replace(dispatch, kind=Kind.ATTENTION)] == self._owners

    def _queue(self, track: int, now: float) -> None:
        """Has a member's host begin to queue what it can, if it has nothing in hand."""
        stage, member = self._tracks[track]
        task = self._hosts[track].begin()
        if task is not None:
            seconds = self._costs[track].host_seconds(member, task)
            self._push(now + seconds, self._finish_queueing, (track, task, now))

    def _finish_queueing(self, track: int, task: Task, start: float, now: float) -> None:
        self._hosts[track].end(task, start, now)
        self._try(track, task.stream, now)
        self._queue(track, now)

    def _note_sizes(self, tracks: Sequence[int], task: Task, now: float) -> None:
        """Has hosts go on that waited for the sizes of what was computed."""
        stage, _ = self._tracks[tracks[0]]
        self._computed[stage, task] += len(tracks)
        if self._computed[stage, task] == self._owners:
            for track, (of, _) in enumerate(self._tracks):
                if of == stage:
                    self._queue(track, now)

    def _try_all(self, track: int, now: float) -> None:
        for stream in self._orders[track].streams:
            self._try(track, stream, now)

    def _try(self, track: int, stream: Stream, now: float) -> None:
        """Starts the head of a stream if it may start."""
        key = (track, stream)
        orders = self._orders[track]
        at = self._next[key]
        if key in self._busy or at == len(orders.streams[stream]):
            return
        task = orders.streams[stream][at]
        done = self.times[track]
        if not all(wait in done for wait in orders.waits[task]) or self._hosts and task not in self._hosts[track].queued:
            return
        self._busy.add(key)
        stage, member = self._tracks[track]
        if stream is Stream.COMPUTE:
            # Its end is known, but it counts as done from then on only, so times gets it when the event comes.
            seconds = self._costs[track].seconds(member, task, self._schedules[stage].microbatches_of(task))
            self._push(now + seconds, self._finish_task, ((track,), task, now))
        elif stream is Stream.STAGES:
            self._hand_over(track, task, now)
        else:
            self._arrived[stage, task] = self._arrived.get((stage, task), 0) + 1
            if self._arrived[stage, task] == len(self._parts[stage, task]):
                assert (stage, stream) not in self._active, "a channel carries one transfer at a time"
                # Latency shares no link; it passes before the first share is carried.
                self._active[stage, stream] = _Active(task, self._costs[track].transfer(task), now, 1.0, now, 0.0)
                self._repace(stage, now)

    def _hand_over(self, track: int, task: Task, now: float) -> None:
        """Starts what stages hand over, when the other one has come to it too."""
        stage, member = self._tracks[track]
        part, is_end = self._schedules[stage].place(task)
        key = (part if is_end else part - 1, member, task.direction, task.microbatch)
        if key not in self._met:
            self._met[key] = track, task
            return
        other, its_task = self._met[key]
        end = now + self._costs[track].group.handover_seconds(member)
        self._push(end, self._finish_task, ((track,), task, now))
        self._push(end, self._finish_task, ((other,), its_task, now))

    def _finish_task(self, tracks: Sequence[int], task: Task, start: float, now: float) -> None:
        for track in tracks:
            self.times[track][task] = (start, now)
            self._busy.remove((track, task.stream))
            self._next[track, task.stream] += 1
        for track in tracks:
            self._try_all(track, now)
        if self._hosts and task.kind is Kind.ATTENTION and task.direction is Pass.FORWARD:
            self._note_sizes(tracks, task, now)

    def _finish_transfer(self, channel: _Channel, active: _Active, version: int, now: float) -> None:
        if self._active.get(channel) is not active or active.version != version:
            return
        del self._active[channel]
        stage, _ = channel
        self._repace(stage, now)
        self._finish_task(self._parts[stage, active.task], active.task, active.start, now)

    def _repace(self, stage: int, now: float) -> None:
        """Sets the pace of what is on its way in a stage, after one came or went."""
        actives = [self._active[stage, stream] for stream in _CHANNELS if (stage, stream) in self._active]
        for active in actives:
            # Time before ``since`` was latency: nothing was carried in it.
            carried = max(0.0, now - active.since) * active.pace
            active.left = max(0.0, active.left - carried)
        slowdown = 1.0
        if len(actives) == 2:
            one, other = (active.price for active in actives)
            if one.seconds and other.seconds:
                slowdown = max(1.0, float((one.loads / one.seconds + other.loads / other.seconds).max()))
        for active in actives:
            latency_left = max(0.0, active.start + active.price.latency - now)
            active.since = now + latency_left
            active.pace = 1 / (active.price.seconds * slowdown) if active.price.seconds else float("inf")
            rest = active.left * active.price.seconds * slowdown
            active.version += 1
            self._push(active.since + rest, self._finish_transfer,
                       ((stage, active.task.stream), active, active.version))

    def _push(self, when: float, finish: Callable[..., None], what: tuple) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, finish, what))
