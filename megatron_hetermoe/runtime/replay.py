"""Runs a schedule on tasks that wait out their price: the executor for real, on a machine that could not compute it.

Where the simulator's figure for a step and the executor's differ, one of them does not do what the schedule says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.runtime import executor
from megatron_hetermoe.runtime.channels import Channel, Message
from megatron_hetermoe.runtime.executor import Table
from megatron_hetermoe.runtime.streams import HostStreams
from megatron_hetermoe.schedule.orders import Schedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task


@dataclass(frozen=True)
class Case:
    """Schedules with the price of each task.

    Attributes:
        stages: what the ZP group of each pipeline stage runs.
        seconds: for each stage and member, of each of its tasks.
    """

    stages: tuple[Schedule, ...]
    seconds: tuple[tuple[dict[Task, float], ...], ...]

    @property
    def members(self) -> int:
        """Of one stage's group."""
        return self.stages[0].placement.members


def priced(*stages: tuple[Schedule, TaskCosts], scale: float = 1.0) -> Case:
    """The schedule of each stage's ZP group with its prices, multiplied by ``scale``. A transfer has the price that it has
    alone on its links."""
    def price(schedule: Schedule, costs: TaskCosts, member: int, task: Task) -> float:
        if task.stream is Stream.COMPUTE:
            return scale * costs.seconds(member, task, schedule.microbatches_of(task))
        if task.stream is Stream.STAGES:
            return scale * costs.group.handover_seconds(member)
        transfer = costs.transfer(task)
        return scale * (transfer.latency + transfer.seconds)

    return Case(tuple(schedule for schedule, _ in stages), tuple(
        tuple(
            {task: price(schedule, costs, member, task) for order in schedule.member(member).streams.values() for task in order}
            for member in range(schedule.placement.members)
        )
        for schedule, costs in stages
    ))


def replay(rank: int, world: int, cases: Sequence[Case]) -> list[float]:
    """Runs cases one after the other, each with a rank for each member of each stage; all ranks of the world call it.

    Returns:
        Seconds of each case on this rank, 0 where it has no use for the rank.
    """
    seconds = []
    for case in cases:
        stage, member = divmod(rank, case.members)
        of_stages = [range(first, first + case.members) for first in range(0, len(case.stages) * case.members, case.members)]
        of_places = list(zip(*of_stages)) if len(case.stages) > 1 else []
        inside = [[dist.new_group(list(ranks)) for _ in range(2)] for ranks in of_stages]
        across = [dist.new_group(list(ranks)) for ranks in of_places]
        dist.barrier()
        if stage >= len(case.stages):
            seconds.append(0.0)
            continue
        channels = {
            stream: Channel(group, group, of_stages[stage], member)
            for stream, group in zip((Stream.OUT, Stream.BACK), inside[stage])
        }
        if across:
            channels[Stream.STAGES] = Channel(across[member], across[member], of_places[member], stage)
        schedule = case.stages[stage]
        table = replay_table(schedule, member, case.seconds[stage][member].__getitem__, channels, stage)
        start = time.perf_counter()
        executor.run(schedule.member(member), table, HostStreams())
        seconds.append(time.perf_counter() - start)
    dist.barrier()
    return seconds


def replay_table(
    schedule: Schedule, member: int, seconds: Callable[[Task], float], channels: dict[Stream, Channel], stage: int = 0
) -> Table:
    """What the executor calls in place of a model.

    A transfer first meets all members that take part in it, then waits, as one whose slowest link sets its pace.

    Args:
        schedule: that the executor runs.
        member: this rank.
        seconds: the price of a task: of this member's, or of a transfer.
        channels: OUT and BACK, and STAGES where there are several.
        stage: this rank's.
    """
    takers = {
        layer: sorted({*range(schedule.attention_members), *schedule.placement.holders_of(layer)})
        for layer in schedule.moe_layers
    }

    def wait(task: Task) -> None:
        time.sleep(seconds(task))

    def transfer(task: Task) -> None:
        _meet(channels[task.stream], [other for other in takers[task.layer] if other != member])
        wait(task)

    def hand_over(task: Task) -> None:
        _, is_end = schedule.place(task)
        _meet(channels[Stream.STAGES], [(stage + (1 if is_end else -1)) % schedule.stages])
        wait(task)

    transfers = {Kind.HANDOVER: hand_over, Kind.DISPATCH: transfer, Kind.COMBINE: transfer}
    return {
        (kind, direction): transfers.get(kind, wait)
        for kind in Kind for direction in Pass
    }


def _meet(channel: Channel, others: Sequence[int]) -> None:
    """Returns when all others have come too."""
    buffers = [torch.zeros(1) for _ in others]
    channel.exchange(
        [Message(other, 0, torch.ones(1)) for other in others],
        [Message(other, 0, buffer) for other, buffer in zip(others, buffers)],
    )
