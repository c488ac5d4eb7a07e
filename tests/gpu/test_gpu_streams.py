"""What is noted of a task on a GPU: its own times, and the host's beside them on one clock."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_hetermoe.cli.launch import has_gpu
from megatron_hetermoe.runtime.streams import CudaStreams
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.schedule.trace import Span

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs a GPU")


def test_compute_leaves_room_for_transfers():
    streams, found = CudaStreams(torch.device("cuda")), {}
    for stream, kind in ((Stream.COMPUTE, Kind.EXPERT), (Stream.OUT, Kind.DISPATCH)):
        with streams.task(stream, Task(kind, Pass.FORWARD, 1, 0), ()):
            found[stream] = torch._C._get_sm_carveout_experimental()
    streams.finish()
    assert 0 < found[Stream.COMPUTE] <= torch.cuda.get_device_properties(0).multi_processor_count // 4
    assert found[Stream.OUT] is None and torch._C._get_sm_carveout_experimental() is None


def test_the_host_is_ahead_of_a_gpu_that_is_busy():
    spans: dict[Task, Span] = {}

    def observe(stream, task, start, end, queued):
        spans[task] = Span(0, stream.value, str(task), start, end, queued=queued)

    streams = CudaStreams(torch.device("cuda"), observe)
    long, short, sent = (Task(kind, Pass.FORWARD, layer, 0) for kind, layer in (
        (Kind.ATTENTION, 1), (Kind.ATTENTION, 2), (Kind.DISPATCH, 1)))
    tensor = torch.zeros(1024, device="cuda")
    tensor.add_(1).mul_(1)  # a kernel's first launch waits for the GPU
    before = time.perf_counter()
    with streams.task(Stream.COMPUTE, long, ()):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
    with streams.task(Stream.COMPUTE, short, ()):
        tensor.add_(1)
    with streams.task(Stream.OUT, sent, (long,)):
        tensor.mul_(1)
    streams.finish()
    assert spans[sent].queued is None and spans[sent].start >= spans[long].end
    assert before < spans[long].queued[0] < spans[long].queued[1] < spans[short].queued[0] < spans[short].queued[1]
    assert spans[short].start >= spans[long].end and spans[short].lead > 0
    assert spans[long].end <= spans[short].end <= time.perf_counter()
