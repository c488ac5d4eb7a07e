"""Measures a channel between two pools, as dispatch loads it: every rank of one sends to every rank of the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_hetermoe.runtime.channels import Channel, Message

_WARM_UP = 2


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
    senders, receivers = range(attention_members), range(attention_members, members)
    found = {}
    for size in sizes:
        # The fewer ranks of the two sides share all the bytes.
        each = max(1, size // max(len(senders), len(receivers)))
        peers = receivers if member in senders else senders
        buffers = [Message(peer, 0, torch.zeros(each, dtype=torch.uint8, device=device)) for peer in peers]
        sends, receives = (buffers, ()) if member in senders else ((), buffers)
        seconds = []
        for _ in range(_WARM_UP + repeats):
            start = _together(channel, device)
            channel.exchange(sends, receives)
            _settle(device)
            seconds.append(time.perf_counter() - start)
        longest = torch.tensor([statistics.median(seconds[_WARM_UP:])], dtype=torch.float64)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=channel.headers)
        found[each * max(len(senders), len(receivers))] = longest.item()
    return found


def _together(channel: Channel, device: torch.device) -> float:
    """Lets all members start at once; returns when."""
    _settle(device)
    dist.barrier(group=channel.headers)
    return time.perf_counter()


def _settle(device: torch.device) -> None:
    if torch.empty(0, device=device).is_cuda:
        torch.cuda.synchronize(device)
