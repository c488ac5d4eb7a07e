"""H tasks: what an attention rank hands to its neighbours in the pipeline, and gets from them, outside autograd."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_hetermoe.runtime.channels import Channel, Message
from megatron_hetermoe.runtime.device import is_gpu
from megatron_hetermoe.runtime.executor import Table
from megatron_hetermoe.runtime.recorder import Recorder
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task


@dataclass
class Handover:
    """The H tasks of one member.

    Forward a stage gives the hidden states of its last layer to the next one, backward their gradients to the one before.
    All have one shape, so nothing travels in front of them.

    Attributes:
        channel: to the ranks at this place of each stage.
        stage: this one, from 0 on, also the member of the channel.
        stages: P. The last one hands over to the first where stages have several chunks.
        firsts: the number of each chunk's first layer; what comes to a chunk, or its gradients go from it, has that number.
        shape: of hidden states, [sequence, microbatch, hidden], as they are on this rank.
        dtype: of hidden states.
        device: where buffers are.
        recorder: told what is sent, where the step is recorded.
        leaving, arrived: by task, hidden states or gradients for A tasks to fill and take.
    """

    channel: Channel
    stage: int
    stages: int
    firsts: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    recorder: Recorder | None = None
    leaving: dict[Task, torch.Tensor] = field(default_factory=dict)
    arrived: dict[Task, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Buffers are made on the handovers' stream and freed by compute, which the allocator must know.
        self._compute = torch.cuda.current_stream() if is_gpu(self.device) else None

    def table(self) -> Table:
        """What the executor calls for H tasks."""
        return {(Kind.HANDOVER, Pass.FORWARD): self._hand_over, (Kind.HANDOVER, Pass.BACKWARD): self._hand_over}

    def give(self, task: Task, tensor: torch.Tensor) -> None:
        """Hands over an A task's result for the H task that follows, which frees its storage."""
        self.leaving[_handover(task)] = tensor

    def take(self, task: Task) -> torch.Tensor:
        """What came for an A task."""
        return self.arrived.pop(_handover(task))

    @torch.no_grad()
    def _hand_over(self, task: Task) -> None:
        behind = task.layer not in self.firsts
        neighbour = (self.stage + (1 if behind else -1)) % self.stages
        if (task.direction is Pass.FORWARD) == behind:
            self._give(task, neighbour)
        else:
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            if self._compute is not None:
                buffer.record_stream(self._compute)
            self.channel.exchange((), [Message(neighbour, 0, buffer)])
            self.arrived[task] = buffer

    def _give(self, task: Task, neighbour: int) -> None:
        tensor = self.leaving.pop(task)
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise RuntimeError(
                f"stage {self.stage + 1} has {list(tensor.shape)} of {tensor.dtype} for {task}, its neighbour awaits "
                f"{list(self.shape)} of {self.dtype}"
            )
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())
        if self.recorder is not None:
            self.recorder.sent(task, tensor.nbytes)
        self.channel.exchange([Message(neighbour, 0, tensor.contiguous())])
        # Only its shape is read from here on, by the backward of the task that made it.
        tensor.untyped_storage().resize_(0)


def _handover(task: Task) -> Task:
    return Task(Kind.HANDOVER, task.direction, task.layer, task.microbatch)
