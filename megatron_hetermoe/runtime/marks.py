"""What this rank is doing, in words: for the message of a rank that has to end because a peer is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_hetermoe.schedule.numbering import Numbering
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task

_KINDS = {
    Kind.ATTENTION: "attention", Kind.DISPATCH: "dispatch", Kind.EXPERT: "experts", Kind.COMBINE: "combine",
    Kind.HANDOVER: "handover between stages",
}
_PASSES = {Pass.FORWARD: "forward", Pass.BACKWARD: "backward", Pass.WEIGHT: "gradients of weights"}


class Marks:
    """Kept by the threads that work and read by the one that watches.

    Each mark is one tuple that is replaced whole, so that no lock is needed.

    Attributes:
        numbering: of the layers of this rank's stage, once it is known: messages have the model's numbers.
    """

    def __init__(self) -> None:
        self._phase = ("start-up", time.time())
        self._tasks: dict[Stream, tuple[Task, float]] = {}
        self.numbering: Numbering | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the main thread does inside, such as "optimizer step"; afterwards what it did before."""
        before, self._phase = self._phase, (name, time.time())
        yield
        self._phase = before

    def enter(self, name: str) -> None:
        """What the main thread does from now on."""
        self._phase = (name, time.time())

    def begin(self, stream: Stream, task: Task) -> None:
        """A stream turns to its next task, to wait until it may start or to run it."""
        self._tasks[stream] = (task, time.time())

    def end(self, stream: Stream) -> None:
        """A stream has no further task."""
        self._tasks.pop(stream, None)

    def in_model(self, task: Task) -> Task:
        """A task with the model's number for its layer."""
        return self.numbering.in_model(task) if self.numbering else task

    def awaited(self) -> str:
        """What this rank waits for and since when: while tasks run, that of the channel that stands still longest."""
        phase, since = self._phase
        tasks = sorted(self._tasks.copy().items(), key=lambda item: item[1][1])
        if not tasks:
            return f"the end of: {phase}, since {_clock(since)}"
        stream, (task, since) = next((item for item in tasks if item[0] is not Stream.COMPUTE), tasks[0])
        task = self.in_model(task)
        return (f"task {task} ({_KINDS[task.kind]} {_PASSES[task.direction]}, layer {task.layer}, microbatch {task.microbatch + 1}) "
                f"on stream {stream.value} in {phase}, since {_clock(since)}")


def _clock(since: float) -> str:
    return f"{time.strftime('%H:%M:%S', time.localtime(since))} ({time.time() - since:.1f} s)"
