"""Runs a schedule on tasks that wait out their price: the executor for real, on a machine that could not compute it.

Where the simulator's figure for a step and the executor's differ, one of them does not do what the schedule says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from megatron_hetermoe.runtime.channels import Channel, Message
from megatron_hetermoe.runtime.executor import Table
from megatron_hetermoe.schedule.orders import Schedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task


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
