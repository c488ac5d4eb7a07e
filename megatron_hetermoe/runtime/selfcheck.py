"""Whether what members of a ZP group received is what was sent: checksums of every message of a step.

A checksum is one pass over a tensor on its device, and stays there until the step is over. Then one number crosses
between ranks, which is 0 when all is well; only when it is not do ranks say what they saw.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_hetermoe.runtime.channels import Message
from megatron_hetermoe.schedule.tasks import Task

_MODULUS = 2**63  # of the sum that crosses between ranks: an int64 of any backend holds it
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class Passage(NamedTuple):
    """One message between two ranks, the same at both ends.

    Attributes:
        task: the transfer.
        part: which of its tensors.
        sender, receiver: global ranks.
    """

    task: Task
    part: int
    sender: int
    receiver: int

    def describe(self, parts: Sequence[str]) -> str:
        """In words, with the layer as the task has it; ``parts`` are the names of a transfer's tensors."""
        return (f"{parts[self.part]} from rank {self.sender} to rank {self.receiver} on channel "
                f"{self.task.stream.value}, task {self.task} (layer {self.task.layer}, microbatch "
                f"{self.task.microbatch + 1})")


class Checksums:
    """What one member sent and received in a step.

    Args:
        ranks: the members' global ranks, in member order.
        member: this one.
    """

    def __init__(self, ranks: Sequence[int], member: int):
        self._ranks = tuple(ranks)
        self._me = self._ranks[member]
        self._sent: dict[Passage, torch.Tensor] = {}
        self._received: dict[Passage, torch.Tensor] = {}

    def sending(self, task: Task, messages: Sequence[Message]) -> None:
        """Messages that are about to leave. On the stream that sends them."""
        for message in messages:
            if message.tensor.numel():
                passage = Passage(task, message.part, self._me, self._ranks[message.member])
                self._sent[passage] = checksum(message.tensor)

    def received(self, task: Task, messages: Sequence[Message]) -> None:
        """Messages that have come. On the stream that received them."""
        for message in messages:
            if message.tensor.numel():
                passage = Passage(task, message.part, self._ranks[message.member], self._me)
                self._received[passage] = checksum(message.tensor)

    def mismatches(self, control: dist.ProcessGroup) -> list[Passage]:
        """The messages that did not come as they were sent, in the order of their receivers. Waits for the device.

        Args:
            control: gloo group over all ranks of the run; all call this together, and find the same.
        """
        sent, received = _on_host(self._sent), _on_host(self._received)
        difference = torch.tensor([(_digest(sent) - _digest(received)) % _MODULUS])
        dist.all_reduce(difference, group=control)
        if difference.item() % _MODULUS == 0:
            return []
        seen: list[tuple[dict[Passage, int], dict[Passage, int]]] = [None] * dist.get_world_size(control)
        dist.all_gather_object(seen, (sent, received), group=control)
        return list(_differing(seen))


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Of a contiguous tensor's bits and the order of its rows: an int64 on its device."""
    words = tensor.view(_WORDS[tensor.element_size()])
    rows = words.sum(dim=tuple(range(1, words.dim())), dtype=torch.int64) if words.dim() > 1 else words.long()
    return (rows * torch.arange(1, 2 * len(rows), 2, device=rows.device)).sum()  # odd factors keep every bit


def _on_host(sums: dict[Passage, torch.Tensor]) -> dict[Passage, int]:
    """The sums as numbers: one copy from each device, where headers are on the host and the rest is not."""
    numbers: dict[Passage, int] = {}
    for device in {tensor.device for tensor in sums.values()}:
        there = {passage: tensor for passage, tensor in sums.items() if tensor.device == device}
        numbers.update(zip(there, torch.stack(list(there.values())).tolist()))
    return numbers


def _digest(sums: dict[Passage, int]) -> int:
    """One number for all; each has a factor of its own, so that two that were exchanged are noticed."""
    return sum(number * (zlib.crc32(repr(tuple(map(str, passage))).encode()) | 1) for passage, number in sums.items())


def _differing(seen: Sequence[tuple[dict[Passage, int], dict[Passage, int]]]) -> Iterator[Passage]:
    sent = {passage: number for of_rank, _ in seen for passage, number in of_rank.items()}
    for _, received in seen:
        yield from (passage for passage, number in received.items() if sent.get(passage) != number)
