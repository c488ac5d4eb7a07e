"""The tasks of a training step and what each waits for.

One transformer layer comes apart into four kinds of task (paper, section 3): A, attention with everything else
that attention ranks hold; D, dispatch of tokens to the holders of their experts; E, the experts; C, combine. K layers
have K+1 A tasks: A_k is the end of layer k-1 (combine's sum, residual) with attention and router of layer k; A_1
starts with the embedding, A_{K+1} is the end of layer K with final norm, head and loss. So the L of the paper's
optimal order is K+1. A layer without experts has an A task only.

A pipeline stage numbers its own layers from 1 to K. H tasks hand over between stages: H_1 from the stage before to A_1, and
H_{K+1} from A_{K+1}, which has no head then, to the next; backward the gradients, the other way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

_WRITTEN = re.compile(r"([ADECH])([FBW])_(\d+),(\d+)")


class _Word(str, Enum):
    """One of a few words, hashed as such: an Enum's own hash is Python code, and tasks are hashed millions of times."""

    __hash__ = str.__hash__


class Kind(_Word):
    """What a task does."""

    ATTENTION = "A"
    DISPATCH = "D"
    EXPERT = "E"
    COMBINE = "C"
    HANDOVER = "H"


class Pass(_Word):
    """Which way through the model."""

    FORWARD = "F"
    BACKWARD = "B"  # gradients of activations and, unless these have tasks of their own, of weights
    WEIGHT = "W"


class Stream(_Word):
    """A queue of a rank: its tasks run one after the other. Streams run beside each other.

    OUT and BACK are the two channels: out from a token's owner to its experts' holders, back to the owner. STAGES is all
    that an attention rank hands to its neighbours in the pipeline, and gets from them.
    """

    COMPUTE = "compute"
    OUT = "out"
    BACK = "back"
    STAGES = "stages"


@dataclass(frozen=True, order=True)
class Task:
    """One task.

    Attributes:
        kind: what it does.
        direction: forward, backward, or, for A and E, the weights' part of backward.
        layer: from 1 on; A and H tasks go to K+1.
        microbatch: from 0 on, within the step; the last one's of a W task for several.
    """

    kind: Kind
    direction: Pass
    layer: int
    microbatch: int

    def __str__(self) -> str:
        """As in the paper: kind, pass, layer, microbatch, such as ``AF_1,2``."""
        return f"{self.kind.value}{self.direction.value}_{self.layer},{self.microbatch + 1}"

    @classmethod
    def parse(cls, text: str) -> Task | None:
        """The task that ``str`` writes so; None for any other text."""
        match = _WRITTEN.fullmatch(text)
        return match and cls(Kind(match[1]), Pass(match[2]), int(match[3]), int(match[4]) - 1)

    @property
    def stream(self) -> Stream:
        """Where it runs. A transfer's backward uses the channel opposite to its forward's."""
        if self.kind in (Kind.ATTENTION, Kind.EXPERT):
            return Stream.COMPUTE
        if self.kind is Kind.HANDOVER:
            return Stream.STAGES
        return Stream.OUT if (self.kind is Kind.DISPATCH) == (self.direction is Pass.FORWARD) else Stream.BACK


def dependencies(task: Task, layers: int, moe_layers: frozenset[int]) -> tuple[Task, ...]:
    """The tasks, on whatever rank, whose results a task reads.

    A transfer or an E task waits for all ranks that take part in the one before it.

    Args:
        task: the task that waits, no W task; these read what B tasks left (``Schedule.left_to``).
        layers: K.
        moe_layers: the layers with experts.
    """
    assert task.direction is not Pass.WEIGHT
    kind, direction, layer, microbatch = task.kind, task.direction, task.layer, task.microbatch
    forward, backward = Pass.FORWARD, Pass.BACKWARD

    def other(kind: Kind, direction: Pass, layer: int) -> Task:
        return Task(kind, direction, layer, microbatch)

    if direction is forward:
        if kind is Kind.ATTENTION:
            if layer == 1:
                return ()
            before = other(Kind.ATTENTION, forward, layer - 1)  # the residual
            return (before, other(Kind.COMBINE, forward, layer - 1)) if layer - 1 in moe_layers else (before,)
        previous = {Kind.DISPATCH: Kind.ATTENTION, Kind.EXPERT: Kind.DISPATCH, Kind.COMBINE: Kind.EXPERT}
        return (other(previous[kind], forward, layer),)
    if kind is Kind.ATTENTION:
        own = other(Kind.ATTENTION, forward, layer)
        if layer == layers + 1:
            return (own,)
        after = other(Kind.ATTENTION, backward, layer + 1)
        return (own, after, other(Kind.DISPATCH, backward, layer)) if layer in moe_layers else (own, after)
    if kind is Kind.COMBINE:
        return (other(Kind.ATTENTION, backward, layer + 1),)
    if kind is Kind.EXPERT:
        return (other(Kind.EXPERT, forward, layer), other(Kind.COMBINE, backward, layer))
    return (other(Kind.EXPERT, backward, layer),)
