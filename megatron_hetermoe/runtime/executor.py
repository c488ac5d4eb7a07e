"""Runs one member's schedule: each stream in its order, streams beside each other."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.runtime.streams import CudaStreams, HostStreams
from megatron_hetermoe.schedule.orders import MemberSchedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task

Table = Mapping[tuple[Kind, Pass], Callable[[Task], None]]
# Seconds after which a thread that only computes in Python lets others go on. With Python's own 5 ms a transfer of a rank
# whose other threads queued kernels took the host half as long again (on an H200: 750 microseconds, not 510).
_TURN = 2e-4


class _Prepared(NamedTuple):
    """What is done when a task's preparation is."""

    task: Task


class _Waiter:
    """A thread that waits for some things to be done."""

    def __init__(self, missing: set[Task | _Prepared]):
        self.missing = missing
        self.wake = threading.Event()


class _Progress:
    """What is done, shared by the streams of one run. A thread is woken when all that it waits for is done, and not before:
    each one that wakes takes the interpreter's lock from the one that queues kernels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: set[Task | _Prepared] = set()
        self._waiters: set[_Waiter] = set()
        self._failure: BaseException | None = None

    def wait_for(self, tasks: tuple[Task | _Prepared, ...]) -> bool:
        """Blocks until the tasks are done; False when another stream failed, so that no more should start."""
        with self._lock:
            missing = set(tasks) - self._done
            if not missing or self._failure:
                return self._failure is None
            waiter = _Waiter(missing)
            self._waiters.add(waiter)
        waiter.wake.wait()
        return self._failure is None

    def finish(self, task: Task | _Prepared) -> None:
        with self._lock:
            self._done.add(task)
            for waiter in tuple(self._waiters):
                waiter.missing.discard(task)
                if not waiter.missing:
                    self._waiters.remove(waiter)
                    waiter.wake.set()

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
            for waiter in self._waiters:
                waiter.wake.set()

    def raise_failure(self) -> None:
        if self._failure:
            raise self._failure


def run(
    schedule: MemberSchedule, table: Table, streams: HostStreams | CudaStreams, marks: Marks | None = None,
    preparations: Table | None = None,
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
        preparations: for some kinds of transfers what the host does before their turn comes, when what they wait for is
            done, or on a GPU queued. Those of a stream run in its order, in a thread of their own, which may block until
            peers do the same; they queue nothing on a GPU.

    Raises:
        Exception: what the first failing task raised, with a note that names the task. Streams that are inside a
            transfer then are left behind: the process is expected to end.
    """
    of_member = _Run(schedule, table, streams, marks or Marks(), preparations or {}, _Progress())
    transfers = [stream for stream in (Stream.OUT, Stream.BACK, Stream.STAGES) if schedule.streams.get(stream)]
    # Daemons, since after a failure one may stay blocked in a transfer whose peer is gone.
    channels = [
        threading.Thread(target=target, args=(stream,), name=f"hetermoe-{stream.value}{beside}", daemon=True)
        for target, beside, streams_of in (
            (of_member.follow, "", transfers), (of_member.prepare, "-ahead", filter(of_member.prepares, transfers)))
        for stream in streams_of
    ]
    with _taking_turns():
        for thread in channels:
            thread.start()
        of_member.follow(Stream.COMPUTE)
        of_member.progress.wait_for(tuple(order[-1] for order in schedule.streams.values() if order))
        of_member.progress.raise_failure()
        for thread in channels:
            thread.join()
    streams.finish()


@dataclass(frozen=True)
class _Run:
    """One run: what its threads do. Arguments as of ``run``."""

    schedule: MemberSchedule
    table: Table
    streams: HostStreams | CudaStreams
    marks: Marks
    preparations: Table
    progress: _Progress

    def follow(self, stream: Stream) -> None:
        """Runs a stream's tasks."""
        for task in self.schedule.streams[stream]:
            self.marks.begin(stream, task)
            waits = self.schedule.waits[task]
            queued = self.schedule.issued_before.get(task, ()) if self.streams.may_share_a_queue else ()
            prepared = (_Prepared(task),) if (task.kind, task.direction) in self.preparations else ()
            if not self.progress.wait_for((*waits, *queued, *prepared)):
                return
            try:
                with self.streams.task(stream, task, waits):
                    self.table[task.kind, task.direction](task)
            except BaseException as error:
                self._fail(stream, task, error)
                return
            self.progress.finish(task)
        self.marks.end(stream)

    def prepares(self, stream: Stream) -> bool:
        """Whether any of a stream's tasks has a preparation."""
        return any((task.kind, task.direction) in self.preparations for task in self.schedule.streams[stream])

    def prepare(self, stream: Stream) -> None:
        """Runs the preparations of a stream's tasks."""
        for task in self.schedule.streams[stream]:
            preparation = self.preparations.get((task.kind, task.direction))
            if preparation is None:
                continue
            if not self.progress.wait_for(self.schedule.waits[task]):
                return
            try:
                preparation(task)
            except BaseException as error:
                self._fail(stream, task, error)
                return
            self.progress.finish(_Prepared(task))

    def _fail(self, stream: Stream, task: Task, error: BaseException) -> None:
        error.add_note(f"in task {self.marks.in_model(task)} on stream {stream.value}")
        self.progress.fail(error)


@contextmanager
def _taking_turns() -> Iterator[None]:
    """Has the threads inside wait for each other no longer than _TURN."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _TURN))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
