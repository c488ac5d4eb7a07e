"""Runs one member's schedule: each stream in its order, streams beside each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.runtime.streams import CudaStreams, HostStreams
from megatron_hetermoe.schedule.orders import MemberSchedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task

Table = Mapping[tuple[Kind, Pass], Callable[[Task], None]]


class _Progress:
    """What is done, shared by the streams of one run."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._done: set[Task] = set()
        self._failure: BaseException | None = None

    def wait_for(self, tasks: tuple[Task, ...]) -> bool:
        """Blocks until the tasks are done; False when another stream failed, so that no more should start."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._done.issuperset(tasks))
            return self._failure is None

    def finish(self, task: Task) -> None:
        with self._changed:
            self._done.add(task)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def raise_failure(self) -> None:
        if self._failure:
            raise self._failure


def run(
    schedule: MemberSchedule, table: Table, streams: HostStreams | CudaStreams, marks: Marks | None = None
) -> None:
    """Runs all tasks of a member and returns when the last is done, or on a GPU queued.

    Compute tasks run in the calling thread, each channel in a thread of its own. A channel's task may block until
    its peers take part, since all see it in the same order (``schedule.checks``); so no stream of this member ever
    waits for another one but for what ``schedule.waits`` names.

    Args:
        schedule: the member's streams and what its tasks wait for.
        table: what to call for each kind of task and pass.
        streams: of the device.
        marks: told of each task that a stream turns to.

    Raises:
        Exception: what the first failing task raised, with a note that names the task. Streams that are inside a
            transfer then are left behind: the process is expected to end.
    """
    progress = _Progress()
    marks = marks or Marks()

    def follow(stream: Stream) -> None:
        for task in schedule.streams[stream]:
            marks.begin(stream, task)
            waits = schedule.waits[task]
            queued = schedule.issued_before.get(task, ()) if streams.may_share_a_queue else ()
            if not progress.wait_for((*waits, *queued)):
                return
            try:
                with streams.task(stream, task, waits):
                    table[task.kind, task.direction](task)
            except BaseException as error:
                error.add_note(f"in task {task} on stream {stream.value}")
                progress.fail(error)
                return
            progress.finish(task)
        marks.end(stream)

    # Daemons, since after a failure one may stay blocked in a transfer whose peer is gone.
    channels = [
        threading.Thread(target=follow, args=(stream,), name=f"hetermoe-{stream.value}", daemon=True)
        for stream in (Stream.OUT, Stream.BACK, Stream.STAGES)
        if schedule.streams.get(stream)
    ]
    for thread in channels:
        thread.start()
    follow(Stream.COMPUTE)
    progress.wait_for(tuple(order[-1] for order in schedule.streams.values() if order))
    progress.raise_failure()
    for thread in channels:
        thread.join()
    streams.finish()
