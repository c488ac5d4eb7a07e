"""What a stream is on the device: its thread alone on the CPU, a CUDA stream that the thread feeds on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_hetermoe.runtime.channels import blocks
from megatron_hetermoe.runtime.device import is_gpu
from megatron_hetermoe.schedule.tasks import Stream, Task

Queued = tuple[float, float] | None  # when the host began and ended to queue a task of a GPU
Observer = Callable[[Stream, Task, float, float, Queued], None]


class HostStreams:
    """Streams of a rank that computes on the CPU: what is done on the host is done.

    Args:
        observe: told of each task, from its stream's thread, with its start and end in seconds of
            ``time.perf_counter``. Time spent waiting for other tasks of the rank is not in between.
    """

    may_share_a_queue = False

    def __init__(self, observe: Observer | None = None):
        self._observe = observe

    @contextmanager
    def task(self, stream: Stream, task: Task, waits: tuple[Task, ...]) -> Iterator[None]:
        """The context in which a task runs, when the host has run all that it waits for."""
        start = time.perf_counter()
        yield
        if self._observe:
            self._observe(stream, task, start, time.perf_counter(), None)

    def finish(self) -> None:
        """After the last task of a run."""


class CudaStreams:
    """Streams of a rank with a GPU: compute on the current stream, a stream of its own for each channel.

    A task is *run* by the host when its kernels are queued. What it waits for on other streams is waited for by its
    stream, so the host goes on.

    Compute leaves the channels' multiprocessors alone where its kernels can be told to. One that has a block for each
    multiprocessor and deals its work out beforehand, as torch's grouped products do, needs two rounds when it lacks a single
    one: on 32 multiprocessors of an H200 beside a transfer that waits it took 1.98 times as long, and 1.06 times on 30 of
    them whether or not one waits.

    Args:
        device: the rank's.
        observe: as for HostStreams, with the times of the GPU and, of compute tasks, when the host queued them; told after
            each run. Costs a synchronisation of the device before and after.
    """

    may_share_a_queue = True  # CUDA_DEVICE_MAX_CONNECTIONS, which recipes set to 1, and the Multi-Process Service

    def __init__(self, device: torch.device, observe: Observer | None = None):
        self._device = device
        self._observe = observe
        self._room = min(2 * blocks(), torch.cuda.get_device_properties(device).multi_processor_count // 4)
        self._channels = {stream: torch.cuda.Stream(device) for stream in (Stream.OUT, Stream.BACK, Stream.STAGES)}
        self._done: dict[Task, torch.cuda.Event] = {}
        self._timed: list[tuple[Stream, Task, torch.cuda.Event, torch.cuda.Event, Queued]] = []
        self._origin: tuple[float, torch.cuda.Event] | None = None

    @contextmanager
    def task(self, stream: Stream, task: Task, waits: tuple[Task, ...]) -> Iterator[None]:
        """The context in which a task is queued: on its stream, behind the events of what it waits for."""
        with torch.cuda.device(self._device):
            queue = self._channels.get(stream) or torch.cuda.current_stream()
            with torch.cuda.stream(queue), self._beside_transfers(stream):
                if self._observe:
                    self.tie_clocks()
                began = time.perf_counter()
                for before in waits:
                    queue.wait_event(self._done[before])
                start = self._record(queue) if self._observe else None
                yield
                self._done[task] = end = self._record(queue)
                if start is not None:
                    # In a transfer the host waits for its peers' sizes, which is no cost.
                    queued = (began, time.perf_counter()) if stream is Stream.COMPUTE else None
                    self._timed.append((stream, task, start, end, queued))

    @contextmanager
    def _beside_transfers(self, stream: Stream) -> Iterator[None]:
        """What a task computes in: kernels that heed it leave room for those of transfers."""
        if stream is not Stream.COMPUTE:
            yield
            return
        torch._C._set_sm_carveout_experimental(self._room)
        try:
            yield
        finally:
            torch._C._set_sm_carveout_experimental(None)

    def finish(self) -> None:
        """Lets what follows on the compute stream wait for the channels, and reports times."""
        for queue in self._channels.values():
            torch.cuda.current_stream().wait_stream(queue)
        self._done.clear()
        if self._observe and self._origin:
            torch.cuda.synchronize(self._device)
            seconds, origin = self._origin
            for stream, task, start, end, queued in self._timed:
                times = (seconds + origin.elapsed_time(event) / 1e3 for event in (start, end))
                self._observe(stream, task, *times, queued)
            self._timed.clear()
            self._origin = None

    def _record(self, queue: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=self._observe is not None)
        event.record(queue)
        return event

    def tie_clocks(self) -> None:
        """Ties the GPU's clock to the host's, which ranks of a machine share: once until ``finish``, and waits for the GPU then."""
        if self._origin is None:
            torch.cuda.synchronize(self._device)
            event = self._record(torch.cuda.current_stream())
            self._origin = time.perf_counter(), event


def streams_for(device: torch.device, observe: Observer | None = None) -> HostStreams | CudaStreams:
    """The streams of a device."""
    return CudaStreams(device, observe) if is_gpu(device) else HostStreams(observe)
