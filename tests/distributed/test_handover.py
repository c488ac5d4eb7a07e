"""What stages hand over: to the right neighbour, in the shape that both ends know."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from megatron_hetermoe.runtime.handover import Handover
from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.schedule.numbering import Numbering
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task

SHAPE = (3, 1, 4)


class Wire:
    """A channel of which one end writes and the other reads."""

    def __init__(self, messages: deque, stage: int):
        self._messages, self._stage = messages, stage

    def exchange(self, sends=(), receives=()):
        for message in sends:
            self._messages.append((self._stage, message.member, message.tensor.clone()))
        for message in receives:
            sender, receiver, tensor = self._messages.popleft()
            assert (sender, receiver) == (message.member, self._stage)
            message.tensor.copy_(tensor)


def pair(shape=SHAPE):
    """The second and the third stage of four, of two and of one layer."""
    messages: deque = deque()
    return [Handover(Wire(messages, stage), stage, 4, (1,), shape, torch.float32, torch.device("cpu"))
            for stage in (1, 2)]


def call(handover: Handover, task: Task) -> None:
    handover.table()[task.kind, task.direction](task)


@pytest.mark.parametrize("direction", [Pass.FORWARD, Pass.BACKWARD])
def test_what_one_stage_gives_the_other_takes(direction):
    before, after = pair()
    ends = [(before, 3), (after, 1)]
    (giver, leaves), (taker, comes) = ends if direction is Pass.FORWARD else reversed(ends)
    tensor = torch.arange(12.0).view(SHAPE)
    expected = tensor.clone()
    giver.give(Task(Kind.ATTENTION, direction, leaves, 5), tensor)
    call(giver, Task(Kind.HANDOVER, direction, leaves, 5))
    call(taker, Task(Kind.HANDOVER, direction, comes, 5))
    assert torch.equal(taker.take(Task(Kind.ATTENTION, direction, comes, 5)), expected)
    assert tensor.untyped_storage().size() == 0, "what was sent is freed"
    assert not giver.leaving and not taker.arrived


def test_another_shape_is_not_sent():
    before, _ = pair()
    before.give(Task(Kind.ATTENTION, Pass.FORWARD, 3, 0), torch.zeros(2, 1, 4))
    with pytest.raises(RuntimeError, match=r"stage 2 has \[2, 1, 4\] of torch.float32 for HF_3,1, its neighbour awaits"):
        call(before, Task(Kind.HANDOVER, Pass.FORWARD, 3, 0))


def test_a_rank_that_waits_for_another_stage_says_so():
    """With the model's number of the layer: the stage has layers 4 and 5."""
    marks = Marks()
    marks.numbering = Numbering((range(4, 6),))
    marks.begin(Stream.STAGES, Task(Kind.HANDOVER, Pass.BACKWARD, 3, 1))
    assert "task HB_6,2 (handover between stages backward, layer 6, microbatch 2) on stream stages" in marks.awaited()
