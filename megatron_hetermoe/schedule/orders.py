"""Schedules: for every stream of every member of a ZP group, the order of its tasks.

A schedule is data. The executor runs it, the simulator prices it; what is proved of it in ``schedule.checks`` holds for
both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise, zip_longest
from typing import Any

from megatron_hetermoe.config.plan import DELAYED, MERGED, SCHEDULES, TOGETHER
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task, dependencies
from megatron_hetermoe.topology.placement import Placement

Order = tuple[Task, ...]
_AHEAD = 2  # microbatches that the host of a holder receives before it queues the experts of one


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
        weight_gradients: as in a plan: part of B tasks; or W tasks, after the gradients of activations have gone out; or
            W tasks of experts only, one for a layer and a wave.
        shared: kinds of compute tasks that several ranks run together, each with a part of the weights, and talk
            to each other while they do (tensor parallelism).
    """

    layers: int
    placement: Placement
    attention_members: int
    waves: tuple[tuple[int, ...], ...]
    forward_only: bool
    weight_gradients: str = TOGETHER
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
        streams = self.streams_of(member)
        return MemberSchedule(streams, self._waits(streams), self._issued_before(streams))

    def streams_of(self, member: int) -> dict[Stream, Order]:
        """The tasks of each of a member's streams, in order, without what they wait for."""
        holds = self.placement.layers_of(member)
        is_attention = member < self.attention_members
        transfers = tuple(
            task for task in self._transfer_order()
            if is_attention or task.kind is not Kind.HANDOVER and task.layer in holds
        )
        streams = {
            Stream.COMPUTE: self.computes_of(member),
            Stream.OUT: tuple(task for task in transfers if task.stream is Stream.OUT),
            Stream.BACK: tuple(task for task in transfers if task.stream is Stream.BACK),
        }
        if handovers := tuple(task for task in transfers if task.stream is Stream.STAGES):
            streams[Stream.STAGES] = handovers
        return streams

    def computes_of(self, member: int) -> Order:
        """The tasks of a member's compute stream, in order."""
        holds = self.placement.layers_of(member)
        is_attention = member < self.attention_members
        return tuple(
            task
            for task in self._compute_order()
            if (is_attention if task.kind is Kind.ATTENTION else task.layer in holds)
        )

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
        if task.direction is Pass.WEIGHT:
            return self.left_to(task)
        return dependencies(task, self.layers, self.moe_layers)

    def left_to(self, task: Task) -> Order:
        """The B tasks whose products for weights a W task does: one, or all of a wave's."""
        assert task.direction is Pass.WEIGHT
        merged = self.weight_gradients == MERGED
        microbatches = next(wave for wave in self.waves if task.microbatch in wave) if merged else (task.microbatch,)
        return tuple(Task(task.kind, Pass.BACKWARD, task.layer, microbatch) for microbatch in microbatches)

    def microbatches_of(self, task: Task) -> int:
        """How many microbatches' rows a task takes."""
        return len(self.left_to(task)) if task.direction is Pass.WEIGHT else 1

    def issue_order(self) -> Iterator[Task]:
        """All tasks of the ZP group in an order in which one after the other could run.

        Streams that share a hardware queue run in the order in which the host queued their kernels, and a transfer's
        kernel holds the queue until its peers take part. If every member queues its transfers in this one order, and
        none before the compute that precedes it here, then the first transfer that is not done is never behind
        one that is not: what else is ahead of it waits for earlier transfers only. So no number of queues deadlocks.
        Compute may be queued earlier than it stands here, unless ranks share it: then its kernels too hold the queue
        until their peers run, so it is queued in this order like a transfer.

        Tokens go out some microbatches ahead of the experts that others come back from: what a holder's host does for a
        transfer, such as waiting for its sizes, so does not come between what it does for one E task and the next.
        Attention loses nothing, since it needs what comes back only when all of the wave has gone out. Where it holds
        some of a layer's experts, all of a wave's attention comes before these, as on its compute stream.
        """
        for wave in self.waves:
            yield from self._issue_wave(wave)

    def _issue_wave(self, wave: tuple[int, ...]) -> Iterator[Task]:
        """The part of ``issue_order`` that is one wave's."""
        yield from self._issue_forward(wave)
        if self.forward_only:
            yield from (Task(Kind.ATTENTION, Pass.FORWARD, self.layers + 1, microbatch) for microbatch in wave)
        else:
            yield from self._issue_backward(wave)

    def _issue_forward(self, wave: tuple[int, ...]) -> Iterator[Task]:
        """A wave's forward, up to the head."""
        for layer in range(1, self.layers + 1):
            yield from self._issue_layer(Pass.FORWARD, layer, layer, wave)

    def _issue_backward(self, wave: tuple[int, ...]) -> Iterator[Task]:
        """A wave's head, backward and W tasks."""
        for layer in range(self.layers + 1, 0, -1):
            yield from self._issue_layer(Pass.BACKWARD, layer, layer - 1, wave)
        yield from self._issue_weights(wave)

    def _issue_weights(self, wave: tuple[int, ...]) -> Iterator[Task]:
        """A wave's W tasks. They carry nothing; no transfer is queued behind one that is not before it in compute's
        order."""
        for layer in range(self.layers + 1, 0, -1):
            for kind in (Kind.ATTENTION, Kind.EXPERT):
                yield from self._weights(kind, layer, wave)

    def _issue_layer(self, direction: Pass, layer: int, experts: int, wave: Sequence[int]) -> Iterator[Task]:
        """A layer's attention in one direction, and the experts that it goes on to."""
        there, back = (Kind.DISPATCH, Kind.COMBINE) if direction is Pass.FORWARD else (Kind.COMBINE, Kind.DISPATCH)
        has_experts = experts in self.moe_layers
        ahead = len(wave) if self._has_attention(experts) else _AHEAD
        returning = iter(wave if has_experts else ())
        for place, microbatch in enumerate(wave):
            if layer > self.layers:
                yield Task(Kind.ATTENTION, Pass.FORWARD, layer, microbatch)
            yield Task(Kind.ATTENTION, direction, layer, microbatch)
            if has_experts:
                yield Task(there, direction, experts, microbatch)
            for earlier in islice(returning, None if microbatch == wave[-1] else int(place >= ahead)):
                yield Task(Kind.EXPERT, direction, experts, earlier)
                yield Task(back, direction, experts, earlier)

    def _has_attention(self, layer: int) -> bool:
        """Whether attention ranks hold experts of a layer."""
        return layer in self.moe_layers and min(self.placement.holders[layer - 1]) < self.attention_members

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
        B tasks: attention ranks still need these, and W tasks fill the time that they need then. A W task for a whole
        wave comes after the B tasks of its layer anyway.
        """
        yield from self._forward_layers(wave)
        yield from self._head(wave)
        if not self.forward_only:
            yield from self._backward_layers(wave)

    def _forward_layers(self, wave: tuple[int, ...]) -> Iterator[Task]:
        for layer in range(1, self.layers + 1):
            for kind in (Kind.ATTENTION, Kind.EXPERT):
                yield from self._block(kind, Pass.FORWARD, layer, wave)

    def _block(self, kind: Kind, direction: Pass, layer: int, wave: tuple[int, ...]) -> Order:
        """A wave's tasks of one kind, direction and layer; none of experts where the layer has none."""
        there = kind is Kind.ATTENTION or layer in self.moe_layers
        return tuple(Task(kind, direction, layer, microbatch) for microbatch in wave if there)

    def _head(self, wave: tuple[int, ...]) -> Iterator[Task]:
        """The head forward and at once backward, so that the experts' backward begins."""
        for microbatch in wave:
            yield Task(Kind.ATTENTION, Pass.FORWARD, self.layers + 1, microbatch)
            if not self.forward_only:
                yield from self._backward(Kind.ATTENTION, self.layers + 1, (microbatch,))

    def _backward_layers(self, wave: tuple[int, ...]) -> Iterator[Task]:
        lowest = min(self.moe_layers, default=None)
        for layer in range(self.layers, 0, -1):
            yield from self._backward(Kind.EXPERT, layer, wave, together=layer == lowest)
            yield from self._backward(Kind.ATTENTION, layer, wave)

    def _backward(self, kind: Kind, layer: int, wave: tuple[int, ...], together: bool = False) -> Iterator[Task]:
        """A layer's B tasks of a kind with their W tasks, one by one or together at the end."""
        tasks, weights = self._block(kind, Pass.BACKWARD, layer, wave), self._weights(kind, layer, wave)
        if together or len(weights) < len(tasks):
            yield from (*tasks, *weights)
        else:
            yield from chain.from_iterable(zip(tasks, weights))

    def _weights(self, kind: Kind, layer: int, wave: tuple[int, ...]) -> Order:
        """A wave's W tasks of one kind and layer. One for all has the number of the last microbatch."""
        if self.weight_gradients == DELAYED:
            return self._block(kind, Pass.WEIGHT, layer, wave)
        if self.weight_gradients == MERGED and kind is Kind.EXPERT:
            return self._block(kind, Pass.WEIGHT, layer, wave[-1:])
        return ()

    def _transfer_order(self) -> Iterator[Task]:
        """All transfers, each directly after the compute task whose result it carries."""
        for task in self._compute_order():
            yield from self._transfer(task)

    def _transfer(self, task: Task) -> Iterator[Task]:
        """The transfer that carries a compute task's result, where one does."""
        layer, microbatch = task.layer, task.microbatch
        if task.direction is Pass.WEIGHT:
            return
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


class Overlapped(Schedule):
    """Zebra whose next wave goes forward while the last one goes backward.

    Layer j of the one goes with layer K+1-j of the other, a wave's microbatches of each at a time: while attention ranks
    do the forward of the next wave, expert ranks do the backward of the last, and the other way round, so each
    transfer has as long as the other wave's part takes. As a layer of the next wave comes, one of the last goes: never
    are more than K+1 layers of a wave's activations there. Gradients add up in zebra's order, so results are the
    same, bit by bit.
    """

    def _compute_order(self) -> Iterator[Task]:
        """As ``Schedule._compute_order``; one wave after the other in an evaluation, where nothing goes backward."""
        if self.forward_only:
            yield from super()._compute_order()
            return
        yield from self._forward_layers(self.waves[0])
        for last, following in pairwise(self.waves):
            yield from self._head(last)
            for layer, other in self._paired_layers():
                yield from self._backward(Kind.EXPERT, layer, last)
                yield from self._block(Kind.ATTENTION, Pass.FORWARD, other, following)
                yield from self._backward(Kind.ATTENTION, layer, last)
                yield from self._block(Kind.EXPERT, Pass.FORWARD, other, following)
        yield from self._head(self.waves[-1])
        yield from self._backward_layers(self.waves[-1])

    def _paired_layers(self) -> Iterator[tuple[int, int]]:
        """Each layer of the last wave, and the one of the next wave that goes with it."""
        return zip(range(self.layers, 0, -1), range(1, self.layers + 1))

    def issue_order(self) -> Iterator[Task]:
        """As ``Schedule.issue_order``. Both pools compute a microbatch, then both channels carry what came of it: so a
        hardware queue that is shared keeps neither pool from computing."""
        if self.forward_only:
            yield from super().issue_order()
            return
        forward, backward = Pass.FORWARD, Pass.BACKWARD
        yield from self._issue_forward(self.waves[0])
        for last, following in pairwise(self.waves):
            for microbatch in last:
                yield Task(Kind.ATTENTION, forward, self.layers + 1, microbatch)
                yield (head := Task(Kind.ATTENTION, backward, self.layers + 1, microbatch))
                yield from self._transfer(head)
            for layer, other in self._paired_layers():
                yield from self._issue_beside(
                    self._block(Kind.EXPERT, backward, layer, last),
                    self._block(Kind.ATTENTION, forward, other, following), self._has_attention(layer))
                yield from self._issue_beside(
                    self._block(Kind.ATTENTION, backward, layer, last),
                    self._block(Kind.EXPERT, forward, other, following), self._has_attention(other))
            yield from self._issue_weights(last)
        yield from self._issue_backward(self.waves[-1])

    def _issue_beside(self, first: Order, second: Order, on_attention: bool) -> Iterator[Task]:
        """Attention of one wave and experts of the other, a microbatch of each at a time; in compute's order where ranks
        share the first of them and some have both."""
        apart = on_attention and self.shared.issuperset(task.kind for task in first)
        for pair in [(task, None) for task in (*first, *second)] if apart else zip_longest(first, second):
            both = [task for task in pair if task is not None]
            yield from both
            for task in both:
                yield from self._transfer(task)


def build(
    name: str, layers: int, placement: Placement, attention_members: int, microbatches: int, wave: int | None,
    forward_only: bool = False, weight_gradients: str = TOGETHER, shared: frozenset[Kind] = frozenset(),
) -> Schedule:
    """The schedule that a plan names.

    Args:
        name: one of ``config.plan.SCHEDULES``. Zebra: a wave's microbatches go through the model together, layer by layer.
            Overlapped: the same, and the next wave begins meanwhile. Sequential, the paper's naive disaggregation: one
            microbatch at a time, so one pool always waits for the other.
        layers: K.
        placement: who holds which expert.
        attention_members: M.
        microbatches: those of the step.
        wave: R, the most microbatches on the way together; None for all, and 1 whatever it is for "sequential". Waves are as
            equal as can be, since a short one at the end would have the longest bubbles.
        forward_only: no backward.
        weight_gradients: as ``Schedule.weight_gradients``.
        shared: as ``Schedule.shared``.
    """
    assert name in SCHEDULES
    kind = Overlapped if name == "overlapped" else Schedule
    waves = _waves(microbatches, 1 if name == "sequential" else wave)
    return kind(layers, placement, attention_members, waves, forward_only, weight_gradients, shared)


def zebra(
    layers: int, placement: Placement, attention_members: int, microbatches: int, wave: int | None, *options: Any, **named: Any
) -> Schedule:
    """``build`` of "zebra"."""
    return build("zebra", layers, placement, attention_members, microbatches, wave, *options, **named)


def sequential(layers: int, placement: Placement, attention_members: int, microbatches: int) -> Schedule:
    """``build`` of "sequential"."""
    return build("sequential", layers, placement, attention_members, microbatches, None)


def _waves(microbatches: int, wave: int | None) -> tuple[tuple[int, ...], ...]:
    """A step's microbatches in as few waves of at most that many as can be."""
    count = -(-microbatches // (wave or microbatches))
    bounds = [microbatches * index // count for index in range(count + 1)]
    return tuple(tuple(range(first, last)) for first, last in pairwise(bounds))


def transfers_between(schedule: Schedule, stream: Stream, members: Sequence[int]) -> tuple[Order, ...]:
    """Each member's order of a channel's transfers, without those that one of the members takes no part in."""
    orders = [schedule.member(member).streams[stream] for member in members]
    common = set(orders[0]).intersection(*orders[1:])
    return tuple(tuple(task for task in order if task in common) for order in orders)
