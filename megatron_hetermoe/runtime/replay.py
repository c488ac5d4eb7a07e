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
    """A schedule with the price of each task.

    Attributes:
        schedule: what is run.
        seconds: for each member, of each of its tasks.
    """

    schedule: Schedule
    seconds: tuple[dict[Task, float], ...]


def priced(schedule: Schedule, costs: TaskCosts, scale: float = 1.0) -> Case:
    """A schedule with prices, multiplied by ``scale``. A transfer has the price that it has alone on its links."""
    def price(member: int, task: Task) -> float:
        if task.stream is Stream.COMPUTE:
            return scale * costs.seconds(member, task, schedule.microbatches_of(task))
        transfer = costs.transfer(task)
        return scale * (transfer.latency + transfer.seconds)

    return Case(schedule, tuple(
        {task: price(member, task) for order in schedule.member(member).streams.values() for task in order}
        for member in range(schedule.placement.members)
    ))


def replay(rank: int, world: int, cases: Sequence[Case]) -> list[float]:
    """Runs cases one after the other, each with a rank for each member; all ranks of the world call it.

    Returns:
        Seconds of each case on this rank, 0 where it has no use for the rank.
    """
    seconds = []
    for case in cases:
        members = case.schedule.placement.members
        groups = [dist.new_group(list(range(members))) for _ in range(2)]
        dist.barrier()
        if rank >= members:
            seconds.append(0.0)
            continue
        channels = {
            stream: Channel(group, group, range(members), rank)
            for stream, group in zip((Stream.OUT, Stream.BACK), groups)
        }
        table = replay_table(case.schedule, rank, case.seconds[rank].__getitem__, channels)
        start = time.perf_counter()
        executor.run(case.schedule.member(rank), table, HostStreams())
        seconds.append(time.perf_counter() - start)
    dist.barrier()
    return seconds


def replay_table(
    schedule: Schedule, member: int, seconds: Callable[[Task], float], channels: dict[Stream, Channel]
) -> Table:
    """What the executor calls in place of a model.

    A transfer first meets all members that take part in it, then waits, as one whose slowest link sets its pace.

    Args:
        schedule: that the executor runs.
        member: this rank.
        seconds: the price of a task: of this member's, or of a transfer.
        channels: OUT and BACK.
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

    return {
        (kind, direction): wait if kind in (Kind.ATTENTION, Kind.EXPERT) else transfer
        for kind in Kind for direction in Pass
    }


def _meet(channel: Channel, others: Sequence[int]) -> None:
    """Returns when all others have come too."""
    buffers = [torch.zeros(1) for _ in others]
    channel.exchange(
        [Message(other, 0, torch.ones(1)) for other in others],
        [Message(other, 0, buffer) for other, buffer in zip(others, buffers)],
    )
