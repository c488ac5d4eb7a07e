"""The two channels of a ZP group: messages between pairs of members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist


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


class Channel:
    """One direction of traffic in a ZP group, with a communicator of its own.

    All transfers of a channel are made from one thread, in the order that all members agree on, so messages of one
    part between two members match by order.

    Args:
        group: process group over all members.
        ranks: the members' global ranks, in member order.
        member: this rank.
    """

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], member: int):
        self._group = group
        self._ranks = tuple(ranks)
        self._member = member

    def exchange(self, sends: Sequence[Message] = (), receives: Sequence[Message] = ()) -> None:
        """Sends and receives, and returns when all buffers are filled and all that was sent may be overwritten.

        A message to this member itself is a copy. Empty tensors are not sent: both ends know their size.
        """
        own = {message.part: message.tensor for message in sends if message.member == self._member}
        for message in receives:
            if message.member == self._member:
                message.tensor.copy_(own[message.part])
        works = [
            dist.irecv(message.tensor, self._ranks[message.member], group=self._group, tag=message.part)
            for message in receives
            if message.member != self._member and message.tensor.numel()
        ]
        works += [
            dist.isend(message.tensor, self._ranks[message.member], group=self._group, tag=message.part)
            for message in sends
            if message.member != self._member and message.tensor.numel()
        ]
        for work in works:
            work.wait()
