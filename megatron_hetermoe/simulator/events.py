"""Discrete events over a schedule: the second driver of what the executor runs.

Each member has three streams, as in ``runtime.executor``: a task starts when it heads its stream and all that
``MemberSchedule.waits`` names for it is done. A transfer starts when that holds for every member that takes part and
ends for all at once. All attention members take part in each, so a channel carries one at a time; two on opposite
channels share the links of a member that both sends and receives in both, and slow down together.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_hetermoe.cost.tasks import TaskCosts, Transfer
from megatron_hetermoe.schedule.orders import MemberSchedule, Schedule
from megatron_hetermoe.schedule.tasks import Stream, Task
from megatron_hetermoe.schedule.trace import OPTIMIZER, REDUCE, STEP, Span

_CHANNELS = (Stream.OUT, Stream.BACK)
_STREAMS = (Stream.COMPUTE, *_CHANNELS)


@dataclass(frozen=True)
class MemberResult:
    """What one member did, in seconds since the start of the step.

    Attributes:
        times: for each of its tasks, start and end.
        reduced: start and end of its gradient reduction.
        stepped: start and end of its optimizer step.
    """

    times: dict[Task, tuple[float, float]]
    reduced: tuple[float, float]
    stepped: tuple[float, float]


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

    def spans(self, rank_of: Callable[[int], int], costs: TaskCosts) -> list[Span]:
        """The step as a trace.

        Args:
            rank_of: global rank of a member.
            costs: that were simulated.
        """
        spans = []
        for member, result in enumerate(self.members):
            rank = rank_of(member)
            spans += [
                Span(rank, task.stream.value, str(task), *times, costs.sent(member, task),
                     costs.received(member, task))
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
    assert schedule.placement == costs.placement and schedule.weight_gradients == costs.weight_gradients
    alike = members_alike(schedule, costs)
    run = _Run(schedule, costs, [members[0] for members in alike])
    run.go()
    reduced = {}
    for member in run.members:
        end = max((times[1] for times in run.times[member].values()), default=0.0)
        reduced[member] = (end, end + (0.0 if schedule.forward_only else costs.reduction(member)))
    # The norm of all gradients is known when the last rank has reduced its own, and nobody steps before.
    norm = max(end for _, end in reduced.values())
    by_member: dict[int, MemberResult] = {}
    for members in alike:
        first = members[0]
        step = 0.0 if schedule.forward_only else costs.optimizer(first)
        result = MemberResult(run.times[first], reduced[first], (norm, norm + step))
        by_member.update(dict.fromkeys(members, result))
    results = tuple(by_member[member] for member in range(schedule.placement.members))
    return Result(schedule, results, max(result.stepped[1] for result in results))


def members_alike(schedule: Schedule, costs: TaskCosts) -> list[list[int]]:
    """The members, put together where role, pool and number of experts in every layer are the same: all that a task's
    price and a member's order depend on, so these do the same at the same time."""
    alike: dict[tuple, list[int]] = {}
    layers = range(1, schedule.layers + 1)
    for member, seat in enumerate(costs.group.seats):
        held = tuple(costs.experts(layer)[member] for layer in layers if costs.experts(layer))
        alike.setdefault((member < schedule.attention_members, seat.pool.name, held), []).append(member)
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


class _Run:
    """The state of one simulation."""

    def __init__(self, schedule: Schedule, costs: TaskCosts, members: Sequence[int]):
        self.members = members
        self.times: dict[int, dict[Task, tuple[float, float]]] = {member: {} for member in members}
        self._schedule = schedule
        self._costs = costs
        self._orders: dict[int, MemberSchedule] = {member: schedule.member(member) for member in members}
        self._next = {(member, stream): 0 for member in members for stream in _STREAMS}
        self._busy: set[tuple[int, Stream]] = set()
        self._parts: dict[Task, list[int]] = {}
        for member, orders in self._orders.items():
            for stream in _CHANNELS:
                for task in orders.streams[stream]:
                    self._parts.setdefault(task, []).append(member)
        self._arrived: dict[Task, int] = {}
        self._waiting: set[tuple[int, Stream]] = set()  # members that have come to a transfer
        self._active: dict[Stream, _Active] = {}
        self._events: list[tuple[float, int, int, Task, Stream | None, int]] = []
        self._number = 0  # of events, so that equal times keep the order in which they were made

    def go(self) -> None:
        """Runs until nothing is left.

        Raises:
            AssertionError: when tasks are left that can never start; ``schedule.checks`` proves that none are.
        """
        for member in self.members:
            for stream in _STREAMS:
                self._try(member, stream, 0.0)
        while self._events:
            now, _, member, task, channel, version = heapq.heappop(self._events)
            active = self._active.get(channel)
            if channel is None:
                self._finish_compute(member, task, now)
            elif active and active.task == task and active.version == version:
                self._finish_transfer(channel, now)
        left = [(key, self._orders[key[0]].streams[key[1]][at]) for key, at in self._next.items()
                if at < len(self._orders[key[0]].streams[key[1]])]
        assert not left, f"stuck before {left[0][1]} on member {left[0][0][0]}"

    def _try(self, member: int, stream: Stream, now: float) -> None:
        """Starts the head of a stream if it may start."""
        key = (member, stream)
        orders = self._orders[member]
        at = self._next[key]
        if key in self._busy or key in self._waiting or at == len(orders.streams[stream]):
            return
        task = orders.streams[stream][at]
        done = self.times[member]
        if not all(wait in done for wait in orders.waits[task]):
            return
        if stream is Stream.COMPUTE:
            self._busy.add(key)
            end = now + self._seconds(member, task)
            # Its end is known, but it counts as done from then on only, so times gets it when the event comes.
            self._push(end, member, task, None, 0)
            return
        self._waiting.add(key)
        self._arrived[task] = self._arrived.get(task, 0) + 1
        if self._arrived[task] == len(self._parts[task]):
            assert stream not in self._active, "a channel carries one transfer at a time"
            price = self._costs.transfer(task)
            # Latency shares no link; it passes before the first share is carried.
            self._active[stream] = _Active(task, price, now, 1.0, now, 0.0)
            self._repace(now)

    def _seconds(self, member: int, task: Task) -> float:
        return self._costs.seconds(member, task, self._schedule.microbatches_of(task))

    def _finish_compute(self, member: int, task: Task, now: float) -> None:
        self._busy.remove((member, Stream.COMPUTE))
        self.times[member][task] = (now - self._seconds(member, task), now)
        self._next[member, Stream.COMPUTE] += 1
        for stream in _STREAMS:
            self._try(member, stream, now)

    def _finish_transfer(self, channel: Stream, now: float) -> None:
        active = self._active.pop(channel)
        members = self._parts[active.task]
        for member in members:
            self.times[member][active.task] = (active.start, now)
            self._waiting.remove((member, channel))
            self._next[member, channel] += 1
        self._repace(now)
        for member in members:
            for stream in _STREAMS:
                self._try(member, stream, now)

    def _repace(self, now: float) -> None:
        """Sets the pace of what is on its way, after one came or went."""
        actives = list(self._active.values())
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
            self._push(active.since + rest, -1, active.task, active.task.stream, active.version)

    def _push(self, when: float, member: int, task: Task, channel: Stream | None, version: int) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, member, task, channel, version))
