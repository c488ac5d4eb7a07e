"""The two channels of a ZP group: messages between pairs of members."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import _coalescing_manager


class Message(NamedTuple):
    """One tensor to or from a member.

    Attributes:
        member: the peer, as a member of the ZP group.
        part: which of a transfer's tensors this is; both ends number them alike.
        tensor: contiguous; what is sent, or the buffer that is filled.
    """

    member: int
    part: int
    tensor: torch.Tensor


# NCCL's blocks on a GPU for one channel, each of which has a multiprocessor to itself. A transfer that waits for its peers
# holds them, and compute lacks them (``runtime.streams``).
BLOCKS = 2


def nccl_options() -> dist.ProcessGroupNCCL.Options:
    """For the communicators of channels; NCCL_MAX_CTAS in the environment overrules it."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = options.config.max_ctas = BLOCKS
    return options


def blocks() -> int:
    """What a channel holds of a GPU, in multiprocessors."""
    most = os.environ.get("NCCL_MAX_CTAS", "")
    return int(most) if most.isdecimal() and int(most) else BLOCKS


class Channel:
    """One direction of traffic in a ZP group, with communicators of its own.

    All transfers of a channel are made from one thread, in the order that all members agree on, so messages of one
    part between two members match by order. What is on the host (headers) goes over gloo, what is on a GPU over
    NCCL, so a host can learn sizes while its GPU is busy.

    Args:
        group: process group over all members, for the device's tensors.
        headers: gloo group over all members, for the host's; on the CPU the same.
        ranks: the members' global ranks, in member order.
        member: this rank.
    """

    def __init__(self, group: dist.ProcessGroup, headers: dist.ProcessGroup, ranks: Sequence[int], member: int):
        self._group = group
        self.headers = headers
        self._peers = tuple(dist.get_group_rank(group, rank) for rank in ranks)
        self._member = member

    def exchange(self, sends: Sequence[Message] = (), receives: Sequence[Message] = ()) -> int:
        """Sends and receives; then all buffers are filled and all that was sent may be overwritten.

        On a GPU that holds for what follows on the current stream. A message to this member itself is a copy. Empty
        tensors are not sent: both ends know their size.

        Returns:
            bytes sent to other members.
        """
        own = {message.part: message.tensor for message in sends if message.member == self._member}
        for message in receives:
            if message.member == self._member:
                message.tensor.copy_(own[message.part])
        sends, receives = ([message for message in messages if message.member != self._member and message.tensor.numel()]
                           for messages in (sends, receives))
        # The groups are called themselves: dist.isend and its like take the host longer than a small transfer the network.
        works = self._post(self.headers, *([message for message in messages if not message.tensor.is_cuda]
                                           for messages in (sends, receives)))
        on_device = [[message for message in messages if message.tensor.is_cuda] for messages in (sends, receives)]
        if any(on_device):
            # One launch for all, so that no order of sends and receives between pairs can block.
            with _coalescing_manager(self._group, torch.device("cuda", torch.cuda.current_device()), async_ops=True) as launch:
                self._post(self._group, *on_device)
            works.append(launch)
        for work in works:
            work.wait()
        return sum(message.tensor.nbytes for message in sends)

    def _post(self, group: dist.ProcessGroup, sends: Sequence[Message], receives: Sequence[Message]) -> list[dist.Work]:
        """Begins messages over one of the groups."""
        peers = self._peers
        return [group.recv([tensor], peers[member], part) for member, part, tensor in receives] + [
            group.send([tensor], peers[member], part) for member, part, tensor in sends]
