"""Measures a channel between two pools, as dispatch loads it: every rank of one sends to every rank of the other. And what
queueing that takes the hosts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_hetermoe.cost.cluster import MOST_TENSORS
from megatron_hetermoe.runtime.channels import Channel, Message
from megatron_hetermoe.runtime.device import is_gpu

_WARM_UP = 2
_SMALL = 2**16  # bytes of a tensor, where their number is what counts


def measure_channel(
    channel: Channel, attention_members: int, member: int, members: int, sizes: Sequence[int], repeats: int,
    device: torch.device,
) -> dict[int, float]:
    """Seconds of a transfer by the bytes that its busiest rank sends or receives. All members call it together.

    Args:
        channel: over all members.
        attention_members: M; they send, the others receive, all as much as each other.
        member: this rank.
        members: M + N.
        sizes: bytes of the busiest rank.
        repeats: of which the median counts.
        device: where the bytes are.

    Returns:
        The longest of all members' times, by the bytes that a member of the smaller pool moved.
    """
    most = max(attention_members, members - attention_members)
    found = {}
    for size in sizes:
        # The fewer ranks of the two sides share all the bytes.
        each = max(1, size // most)
        sends, receives = _messages(attention_members, member, members, 1, each, device)
        seconds = []
        for _ in range(_WARM_UP + repeats):
            start = _together(channel, device)
            channel.exchange(sends, receives)
            _settle(device)
            seconds.append(time.perf_counter() - start)
        found[each * most] = _longest(channel, seconds)
    return found


def measure_queueing(
    channel: Channel, attention_members: int, member: int, members: int, repeats: int, device: torch.device
) -> list[float]:
    """Seconds in which a host queues a transfer of one and of two tensors with each peer, peers not waited for; 0 where the
    host is the device. All members call it together.

    Args:
        channel, attention_members, member, members, repeats, device: as of ``measure_channel``.

    Returns:
        The longest of all members' times.
    """
    if not is_gpu(device):
        return [0.0] * MOST_TENSORS
    found = []
    for tensors in range(1, MOST_TENSORS + 1):
        sends, receives = _messages(attention_members, member, members, tensors, _SMALL, device)
        seconds = []
        for _ in range(_WARM_UP + repeats):
            start = _together(channel, device)
            channel.exchange(sends, receives)
            seconds.append(time.perf_counter() - start)
        _settle(device)
        found.append(_longest(channel, seconds))
    return found


def _messages(
    attention_members: int, member: int, members: int, tensors: int, size: int, device: torch.device
) -> tuple[list[Message], list[Message]]:
    """What a member sends and receives: so many tensors of that many bytes to each expert member, or from each attention member."""
    is_sender = member < attention_members
    peers = range(attention_members, members) if is_sender else range(attention_members)
    buffers = [Message(peer, part, torch.zeros(size, dtype=torch.uint8, device=device))
               for peer in peers for part in range(tensors)]
    return (buffers, []) if is_sender else ([], buffers)


def _longest(channel: Channel, seconds: Sequence[float]) -> float:
    """The longest of all members' medians, without the first times."""
    longest = torch.tensor([statistics.median(seconds[_WARM_UP:])], dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=channel.headers)
    return longest.item()


def _together(channel: Channel, device: torch.device) -> float:
    """Lets all members start at once; returns when."""
    _settle(device)
    dist.barrier(group=channel.headers)
    return time.perf_counter()


def _settle(device: torch.device) -> None:
    if is_gpu(device):
        torch.cuda.synchronize(device)
