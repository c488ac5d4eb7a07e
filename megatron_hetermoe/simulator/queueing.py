"""A member's host, which queues what its GPU runs: one task at a time, since Python's lock is one for all threads.

As in ``runtime.executor`` a task is queued when those before it on its stream, those that it waits for on this member and
those that ``MemberSchedule.issued_before`` names are queued; they need not be done, for on the GPU streams wait for each
other. Only a dispatch waits for the GPU: its sizes are known when what it carries has been computed. Of tasks that can be
queued the first is the one that could first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from megatron_hetermoe.schedule.orders import MemberSchedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task


def waits_for_sizes(task: Task) -> bool:
    """Whether the host must know what was computed before it can queue a task."""
    return task.kind is Kind.DISPATCH and task.direction is Pass.FORWARD


class HostQueue:
    """What a host has queued, and what comes next.

    Args:
        orders: the member's.
        knows_sizes: whether all owners have computed what a dispatch carries.

    Attributes:
        queued: when it began and ended to queue each task, in seconds.
    """

    def __init__(self, orders: MemberSchedule, knows_sizes: Callable[[Task], bool]):
        self.queued: dict[Task, tuple[float, float]] = {}
        self._orders = orders
        self._knows_sizes = knows_sizes
        self._next = dict.fromkeys(orders.streams, 0)
        self._ready: deque[Task] = deque()
        self._taken: set[Stream] = set()  # those whose next task is ready or being queued
        self._is_busy = False

    def begin(self) -> Task | None:
        """The task that it begins to queue; None while it is busy, or has none."""
        for stream, order in self._orders.streams.items():
            if stream not in self._taken and self._next[stream] < len(order) and self._may(task := order[self._next[stream]]):
                self._taken.add(stream)
                self._ready.append(task)
        if self._is_busy or not self._ready:
            return None
        self._is_busy = True
        return self._ready.popleft()

    def end(self, task: Task, start: float, end: float) -> None:
        """A task is queued."""
        self.queued[task] = start, end
        self._next[task.stream] += 1
        self._taken.remove(task.stream)
        self._is_busy = False

    def _may(self, task: Task) -> bool:
        before = (*self._orders.waits[task], *self._orders.issued_before.get(task, ()))
        return all(one in self.queued for one in before) and (not waits_for_sizes(task) or self._knows_sizes(task))
