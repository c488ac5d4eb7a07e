"""Seconds of each task of a ZP group under a placement, and what its transfers put on each link."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_hetermoe.config.plan import DELAYED, TOGETHER, Plan
from megatron_hetermoe.config.step import TaskSeconds
from megatron_hetermoe.cost.cluster import Cluster, Kind
from megatron_hetermoe.cost.group import LINKS, GroupCosts, seats_of
from megatron_hetermoe.schedule.tasks import Kind as TaskKind
from megatron_hetermoe.schedule.tasks import Pass, Stream, Task
from megatron_hetermoe.topology.layout import layout_of
from megatron_hetermoe.topology.placement import Placement

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Transfer:
    """One transfer's price.

    Attributes:
        latency: seconds until its first byte is there.
        seconds: after that, when nothing shares its links.
        loads: [members x LINKS], seconds for which it occupies each link; the largest is ``seconds``.
    """

    latency: float
    seconds: float
    loads: np.ndarray


class TaskCosts:
    """The price of every task of one ZP group under a placement, and of what follows the last one.

    Args:
        group: the group's costs.
        placement: who holds which expert.
        weight_gradients: as in a plan; those that are W tasks are no part of B tasks.
    """

    def __init__(self, group: GroupCosts, placement: Placement, weight_gradients: str = TOGETHER):
        self.group = group
        self.placement = placement
        self.weight_gradients = weight_gradients
        self._counts = [
            tuple(holders.count(member) for member in range(group.members)) for holders in placement.holders
        ]
        self._transfers: dict[tuple[TaskKind, Stream, tuple[int, ...]], Transfer] = {}
        self._exchanged: dict[tuple[TaskKind, Stream, tuple[int, ...]], list[float]] = {}
        self._expert_weights: dict[tuple[int, int], float] = {}

    @property
    def without_hosts(self) -> TaskCosts:
        """The same where queueing tasks takes hosts nothing."""
        return TaskCosts(replace(self.group, hosts_count=False), self.placement, self.weight_gradients)

    def seconds(self, member: int, task: Task, microbatches: int = 1) -> float:
        """Of an A or E task on a member; of a W task that is one for several microbatches, with their number."""
        if task.direction is Pass.WEIGHT:
            return self._weights(member, task, microbatches)
        way = 0 if task.direction is Pass.FORWARD else 1
        if task.kind is TaskKind.ATTENTION:
            seconds = self.group.attention[member][way][task.layer - 1]
        else:
            seconds = self.group.expert_seconds(member, way, self._counts[task.layer - 1][member])
        apart = self.weight_gradients == DELAYED or \
            self.weight_gradients != TOGETHER and task.kind is TaskKind.EXPERT
        return seconds - self._weights(member, task) if apart and way else seconds

    def _weights(self, member: int, task: Task, microbatches: int = 1) -> float:
        """Seconds of the weights' part of a task's backward, or of one for so many microbatches."""
        if task.kind is TaskKind.ATTENTION:
            return self.group.attention_weights[member][task.layer - 1]
        key = member, microbatches
        if key not in self._expert_weights:
            self._expert_weights[key] = self.group.expert_weights(*key)
        return self._counts[task.layer - 1][member] * self._expert_weights[key]

    def host_seconds(self, member: int, task: Task) -> float:
        """In which a member's host queues a task. That of a W task is in its B task's, since nothing measures the two apart."""
        if task.direction is Pass.WEIGHT:
            return 0.0
        way = 0 if task.direction is Pass.FORWARD else 1
        if task.kind is TaskKind.ATTENTION:
            return self.group.host_attention[member][way][task.layer - 1]
        if task.kind is TaskKind.EXPERT:
            return self.group.host_expert(member, way, self._counts[task.layer - 1][member])
        return self.group.host_transfer(member, task.kind)

    def host_computes(self, member: int) -> float:
        """Seconds in which a member's host queues its A and E tasks of a microbatch."""
        of_attention = self.group.host_attention[member] if member < self.group.attention_members else ()
        experts = (self.host_seconds(member, Task(TaskKind.EXPERT, way, layer, 0))
                   for layer in range(1, len(self.placement.holders) + 1) for way in (Pass.FORWARD, Pass.BACKWARD))
        return sum(map(sum, of_attention)) + sum(experts)

    def host_transfers(self, member: int) -> float:
        """Seconds in which a member's host queues its D and C tasks of a microbatch."""
        layers = sum(1 for counts in self._counts if any(counts) and (member < self.group.attention_members or counts[member]))
        return layers * 2 * sum(self.group.host_transfer(member, kind) for kind in (TaskKind.DISPATCH, TaskKind.COMBINE))

    def transfer(self, task: Task) -> Transfer:
        """Of a D or C task."""
        import numpy as np

        key = (task.kind, task.stream, self._counts[task.layer - 1])
        if key not in self._transfers:
            loads = self.group.link_seconds(task.kind, task.stream, np.array(key[2], float)).ravel()
            self._transfers[key] = Transfer(self.group.latency, float(loads.max()), loads)
        return self._transfers[key]

    def sent(self, member: int, task: Task) -> int:
        """Bytes that a member sends others in a task; none in one that is no transfer."""
        if task.stream is Stream.COMPUTE:
            return 0
        if task.kind is TaskKind.HANDOVER:
            ends = task.layer not in self.group.firsts
            return self.group.handover if ends == (task.direction is Pass.FORWARD) else 0
        owners = range(self.group.attention_members)
        key = (task.kind, task.stream, self._counts[task.layer - 1])
        if key not in self._exchanged:
            self._exchanged[key] = [float(self.group.exchanged(task.kind, task.stream, held)) for held in key[2]]
        sizes = self._exchanged[key]
        if task.stream is Stream.OUT:
            return round(sum(sizes) - sizes[member]) if member in owners else 0
        return round(sizes[member] * sum(owner != member for owner in owners) * self._share(member))

    def received(self, member: int, task: Task) -> tuple[int, ...]:
        """The tokens for each of a member's experts that a dispatch brings it; none in another task."""
        if task.kind is not TaskKind.DISPATCH or task.direction is not Pass.FORWARD:
            return ()
        return (round(self.group.expert_tokens * self._share(member)),) * self._counts[task.layer - 1][member]

    def _share(self, member: int) -> float:
        """What each of the ranks that are a member gets of its tokens, on average."""
        return 1.0 if member < self.group.attention_members else 1 / self.group.expert_tensor

    def reduction(self, member: int) -> float:
        """Seconds of a member's gradient reduction."""
        return self.group.reduction(member, self.placement.experts_held(member))

    def optimizer(self, member: int) -> float:
        """Seconds of a member's optimizer step."""
        return self.group.optimizer(member, self.placement.experts_held(member))

    def experts(self, layer: int) -> tuple[int, ...]:
        """How many experts of a layer each member holds."""
        return self._counts[layer - 1]

    def typical(self) -> TaskSeconds:
        """The median of each kind and pass."""
        group = self.group
        m, count = group.attention_members, len(self.placement.holders)
        layers = [layer for layer, holders in enumerate(self.placement.holders, start=1) if holders]

        def computed(kind: TaskKind, way: Pass, members: range, of: Sequence[int]) -> float:
            return statistics.median([
                self.seconds(member, Task(kind, way, layer, 0)) for member in members for layer in of
                if kind is TaskKind.ATTENTION or self._counts[layer - 1][member]] or [0.0])

        def sent(kind: TaskKind, way: Pass) -> float:
            prices = [self.transfer(Task(kind, way, layer, 0)) for layer in layers]
            return statistics.median(price.latency + price.seconds for price in prices)

        found: dict[str, float] = {}
        for name, way in (("forward", Pass.FORWARD), ("backward", Pass.BACKWARD)):
            found[f"attention_{name}"] = computed(TaskKind.ATTENTION, way, range(m), range(1, count + 2))
            found[f"expert_{name}"] = computed(TaskKind.EXPERT, way, range(m, group.members), layers)
            found[f"moved_{name}"] = computed(TaskKind.EXPERT, way, range(m), layers)
            found[f"dispatch_{name}"] = sent(TaskKind.DISPATCH, way)
            found[f"combine_{name}"] = sent(TaskKind.COMBINE, way)
        found["handover"] = max(map(group.handover_seconds, range(m))) if group.stages > 1 else 0.0
        return TaskSeconds(**found)


def costs_of_plan(plan: Plan, cluster: Cluster, kinds: Mapping[str, Kind], stage: int = 0) -> TaskCosts:
    """The prices of a plan that was made for a cluster, for a ZP group of a pipeline stage."""
    assert plan.step is not None and plan.pools
    layout = layout_of(plan)
    seats = seats_of(plan.pools, cluster, kinds)
    group = GroupCosts(
        plan.model, plan.step, tuple(seats[layout.members_of(holder)[0]] for holder in range(layout.holders)), layout.m,
        plan.groups, plan.attention_precision, plan.tensor_parallel, plan.expert_tensor_parallel,
        context=plan.context_parallel,
    )
    placement = Placement(plan.placement, layout.holders).of_chunks(plan.chunks_of_stage(stage))
    return TaskCosts(group.of_stages(plan.stage_layers, plan.virtual_stages)[stage], placement, plan.weight_gradients)
