"""Schedules: for every stream of every member of a ZP group, the order of its tasks.

A schedule is data. The executor runs it, the simulator prices it; what is proved of it in ``schedule.checks`` holds for
both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task, dependencies
from megatron_hetermoe.topology.placement import Placement

Order = tuple[Task, ...]


@dataclass(frozen=True)
class MemberSchedule:
    """The orders of one member's streams, and what its tasks wait for on this member.

    Attributes:
        streams: for each stream, its tasks in order.
        waits: for each task, the tasks of this member, on whatever stream, that must be done before it starts.
            What it needs from other members arrives through its transfers.
        issued_before: for each transfer and each shared compute task, the tasks of this member that the host must
            have queued before it, on a device whose streams may share a hardware queue (``Schedule.issue_order``).
    """

    streams: dict[Stream, Order]
    waits: dict[Task, Order]
    issued_before: dict[Task, Order]


@dataclass(frozen=True)
class Schedule:
    """One step, or one evaluation, of a ZP group.

    Attributes:
        layers: K.
        placement: who holds which expert.
        attention_members: M; members from M on are expert ranks.
        waves: the microbatches of each wave, in order.
        forward_only: evaluation, which has no backward.
        delayed: weights' gradients are W tasks, after the gradients of activations have gone out.
        shared: kinds of compute tasks that several ranks run together, each with a part of the weights, and talk
            to each other while they do (tensor parallelism).
    """

    layers: int
    placement: Placement
    attention_members: int
    waves: tuple[tuple[int, ...], ...]
    forward_only: bool
    delayed: bool = False
    shared: frozenset[Kind] = frozenset()

    @cached_property
    def moe_layers(self) -> frozenset[int]:
        """The layers with experts."""
        return frozenset(layer for layer, holders in enumerate(self.placement.holders, start=1) if holders)

    def is_shared(self, task: Task) -> bool:
        """Whether ranks talk to each other in a compute task; W tasks are each rank's own products."""
        return task.kind in self.shared and task.direction is not Pass.WEIGHT

    @property
    def last_microbatch(self) -> int:
        """The microbatch after whose backward a layer's gradients are complete."""
        return self.waves[-1][-1]

    def member(self, member: int) -> MemberSchedule:
        """The orders of one member's streams; those of a holder, where several ranks are one."""
        holds = self.placement.layers_of(member)
        is_attention = member < self.attention_members
        computes = tuple(
            task
            for task in self._compute_order()
            if (is_attention if task.kind is Kind.ATTENTION else task.layer in holds)
        )
        transfers = tuple(
            task for task in self._transfer_order()
            if is_attention or task.kind is not Kind.HANDOVER and task.layer in holds
        )
        streams = {
            Stream.COMPUTE: computes,
            Stream.OUT: tuple(task for task in transfers if task.stream is Stream.OUT),
            Stream.BACK: tuple(task for task in transfers if task.stream is Stream.BACK),
        }
        if handovers := tuple(task for task in transfers if task.stream is Stream.STAGES):
            streams[Stream.STAGES] = handovers
        return MemberSchedule(streams, self._waits(streams), self._issued_before(streams))

    def tasks_of(self, member: int) -> frozenset[Task]:
        """One member's tasks, in no order."""
        holds, is_attention = self.placement.layers_of(member), member < self.attention_members
        return frozenset(
            task for task in self.issue_order()
            if (is_attention if task.kind in (Kind.ATTENTION, Kind.HANDOVER) else
                task.layer in holds or is_attention and task.kind is not Kind.EXPERT)
        )

    def dependencies(self, task: Task) -> Order:
        """The tasks of the ZP group whose results a task reads."""
        return dependencies(task, self.layers, self.moe_layers)

    def issue_order(self) -> Iterator[Task]:
        """All tasks of the ZP group in an order in which one after the other could run.

        Streams that share a hardware queue run in the order in which the host queued their kernels, and a transfer's
        kernel holds the queue until its peers take part. If every member queues its transfers in this one order, and
        none before the compute that precedes it here, then the first transfer that is not done is never behind
        one that is not: what else is ahead of it waits for earlier transfers only. So no number of queues deadlocks.
        Compute may be queued earlier than it stands here, unless ranks share it: then its kernels too hold the queue
        until their peers run, so it is queued in this order like a transfer. Where attention ranks that share their
        part also hold a layer's experts, all of a wave's attention comes before these, as on their compute stream.
        """
        for wave in self.waves:
            yield from self._issue_wave(wave)

    def _issue_wave(self, wave: tuple[int, ...]) -> Iterator[Task]:
        """The part of ``issue_order`` that is one wave's."""
        head = self.layers + 1
        for layer in range(1, head):
            yield from self._issue_layer(Pass.FORWARD, layer, layer, wave)
        if self.forward_only:
            yield from (Task(Kind.ATTENTION, Pass.FORWARD, head, microbatch) for microbatch in wave)
        else:
            for layer in range(head, 0, -1):
                yield from self._issue_layer(Pass.BACKWARD, layer, layer - 1, wave)
            # W tasks carry nothing; no transfer is queued behind one that is not before it in compute's order.
            yield from (task for task in self._wave_order(wave) if task.direction is Pass.WEIGHT)

    def _issue_layer(self, direction: Pass, layer: int, experts: int, wave: Sequence[int]) -> Iterator[Task]:
        """A layer's attention in one direction, and the experts that it goes on to."""
        there, back = (Kind.DISPATCH, Kind.COMBINE) if direction is Pass.FORWARD else (Kind.COMBINE, Kind.DISPATCH)
        has_experts = experts in self.moe_layers
        on_attention = has_experts and min(self.placement.holders[experts - 1]) < self.attention_members
        attention_first = Kind.ATTENTION in self.shared and on_attention
        for part in [wave] if attention_first else [(microbatch,) for microbatch in wave]:
            for microbatch in part:
                if layer > self.layers:
                    yield Task(Kind.ATTENTION, Pass.FORWARD, layer, microbatch)
                yield Task(Kind.ATTENTION, direction, layer, microbatch)
                if has_experts:
                    yield Task(there, direction, experts, microbatch)
            for microbatch in part if has_experts else ():
                yield Task(Kind.EXPERT, direction, experts, microbatch)
                yield Task(back, direction, experts, microbatch)

    def _compute_order(self) -> Iterator[Task]:
        """All A and E tasks in the order in which a member that had all of them would run them.

        The paper's optimal orders (section 3): attention ranks (A^F_{1,1} .. A^F_{1,R}) .. (A^F_{L,1} A^B_{L,1} ..
        A^F_{L,R} A^B_{L,R}) .. (A^B_{1,1} .. A^B_{1,R}); expert ranks all forwards, then all backwards, layer by layer.
        A member's own order is this one without the tasks that it does not have, so members that hold
        experts beside attention agree with all others on the order of every transfer.
        """
        for wave in self.waves:
            yield from self._wave_order(wave)

    def _wave_order(self, wave: tuple[int, ...]) -> Iterator[Task]:
        """The part of ``_compute_order`` that is one wave's.

        A W task follows its B task at once: the same order as without W tasks, so never slower, and what was waited for
        leaves earlier. In the first layer with experts, whose backward is an expert rank's last, W tasks come after all
        B tasks: attention ranks still need these, and W tasks fill the time that they need then.
        """
        head = self.layers + 1
        lowest = min(self.moe_layers, default=None)
        for layer in range(1, head):
            yield from (Task(Kind.ATTENTION, Pass.FORWARD, layer, microbatch) for microbatch in wave)
            if layer in self.moe_layers:
                yield from (Task(Kind.EXPERT, Pass.FORWARD, layer, microbatch) for microbatch in wave)
        for microbatch in wave:
            yield Task(Kind.ATTENTION, Pass.FORWARD, head, microbatch)
            if not self.forward_only:
                yield from self._backward(Kind.ATTENTION, head, (microbatch,), together=False)
        if self.forward_only:
            return
        for layer in range(self.layers, 0, -1):
            if layer in self.moe_layers:
                yield from self._backward(Kind.EXPERT, layer, wave, together=layer == lowest)
            yield from self._backward(Kind.ATTENTION, layer, wave, together=False)

    def _backward(self, kind: Kind, layer: int, wave: tuple[int, ...], together: bool) -> Iterator[Task]:
        """A layer's B tasks with their W tasks, one by one or together at the end."""
        for microbatch in wave:
            yield Task(kind, Pass.BACKWARD, layer, microbatch)
            if self.delayed and not together:
                yield Task(kind, Pass.WEIGHT, layer, microbatch)
        if self.delayed and together:
            yield from (Task(kind, Pass.WEIGHT, layer, microbatch) for microbatch in wave)

    def _transfer_order(self) -> Iterator[Task]:
        """All transfers, each directly after the compute task whose result it carries."""
        for task in self._compute_order():
            layer, microbatch = task.layer, task.microbatch
            if task.direction is Pass.WEIGHT:
                continue
            if task.kind is Kind.EXPERT:
                kind = Kind.COMBINE if task.direction is Pass.FORWARD else Kind.DISPATCH
                yield Task(kind, task.direction, layer, microbatch)
            elif task.direction is Pass.FORWARD and layer in self.moe_layers:
                yield Task(Kind.DISPATCH, Pass.FORWARD, layer, microbatch)
            elif task.direction is Pass.BACKWARD and layer - 1 in self.moe_layers:
                yield Task(Kind.COMBINE, Pass.BACKWARD, layer - 1, microbatch)

    def _waits(self, streams: dict[Stream, Order]) -> dict[Task, Order]:
        """For each task of a member, the nearest tasks of the same member among what it depends on."""
        local = {task for order in streams.values() for task in order}

        # A member that lacks many layers is far from what it depends on, by twice as many ways a layer: each task
        # on the way is looked at once.
        known: dict[Task, Order] = {}

        def nearest(task: Task) -> Order:
            if task not in known:
                known[task] = tuple(dict.fromkeys(
                    found for dependency in self.dependencies(task)
                    for found in ((dependency,) if dependency in local else nearest(dependency))
                ))
            return known[task]

        for task in self.issue_order():
            nearest(task)  # in order, so that no recursion is deeper than a task
        return {task: known[task] for task in local}

    def _issued_before(self, streams: dict[Stream, Order]) -> dict[Task, Order]:
        """For each transfer of a member, the transfer before it and the last compute task to be queued before it; for
        each shared compute task, the transfer before it."""
        position = {task: index for index, task in enumerate(streams[Stream.COMPUTE])}
        transfers = {task for stream, order in streams.items() if stream is not Stream.COMPUTE for task in order}
        before: dict[Task, Order] = {}
        transfer: Task | None = None
        compute: Task | None = None
        for task in self.issue_order():
            if task in position:
                if self.is_shared(task) and transfer is not None:
                    before[task] = (transfer,)
                compute = task if compute is None else max(compute, task, key=position.__getitem__)
            elif task in transfers:
                before[task] = tuple(earlier for earlier in (transfer, compute) if earlier is not None)
                transfer = task
        return before


def zebra(
    layers: int, placement: Placement, attention_members: int, microbatches: int, wave: int | None,
    forward_only: bool = False, delayed: bool = False, shared: frozenset[Kind] = frozenset(),
) -> Schedule:
    """Zebra parallelism: a wave's microbatches go through the model together, layer by layer.

    Args:
        layers: K.
        placement: who holds which expert.
        attention_members: M.
        microbatches: those of the step.
        wave: R, the most microbatches on the way together; None for all. Waves are as equal as can be, since a short
            one at the end would have the longest bubbles.
        forward_only: no backward.
        delayed: gradients of weights are W tasks.
        shared: as ``Schedule.shared``.
    """
    count = -(-microbatches // (wave or microbatches))
    bounds = [microbatches * index // count for index in range(count + 1)]
    waves = tuple(tuple(range(first, last)) for first, last in zip(bounds, bounds[1:]))
    return Schedule(layers, placement, attention_members, waves, forward_only, delayed, shared)


def sequential(
    layers: int, placement: Placement, attention_members: int, microbatches: int, forward_only: bool = False,
    delayed: bool = False, shared: frozenset[Kind] = frozenset(),
) -> Schedule:
    """Naive disaggregation: one microbatch at a time, so one pool always waits for the other."""
    return zebra(layers, placement, attention_members, microbatches, 1, forward_only, delayed, shared)


def build(
    name: str, layers: int, placement: Placement, attention_members: int, microbatches: int, wave: int | None,
    forward_only: bool = False, delayed: bool = False, shared: frozenset[Kind] = frozenset(),
) -> Schedule:
    """The schedule that a plan names (``config.plan.SCHEDULES``)."""
    if name == "sequential":
        return sequential(layers, placement, attention_members, microbatches, forward_only, delayed, shared)
    assert name == "zebra"
    return zebra(layers, placement, attention_members, microbatches, wave, forward_only, delayed, shared)


def transfers_between(schedule: Schedule, stream: Stream, members: Sequence[int]) -> tuple[Order, ...]:
    """Each member's order of a channel's transfers, without those that one of the members takes no part in."""
    orders = [schedule.member(member).streams[stream] for member in members]
    common = set(orders[0]).intersection(*orders[1:])
    return tuple(tuple(task for task in order if task in common) for order in orders)
