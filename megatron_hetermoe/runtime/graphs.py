"""A piece of work that is queued by one call: a CUDA graph, or on the CPU the work itself."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_hetermoe.runtime.device import is_gpu

Work = Callable[[], None]


class HostGraphs:
    """On the CPU there is nothing to queue: the work runs again each time, on the same tensors."""

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The context in which work is captured."""
        yield

    def capture(self, work: Work, memory: Hashable) -> Work:
        """What does the work."""
        return work


class CudaGraphs:
    """Captures what work queues on the GPU, and queues it again in one launch.

    Graphs may share memory. What one leaves behind for others must be held by whoever captured it; all else of its memory
    is used by graphs that are captured after it, so while their results are needed it must not be replayed. All are
    replayed on one stream.

    Args:
        device: the rank's.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pools: dict[Hashable, Any] = defaultdict(torch.cuda.graph_pool_handle)
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The context in which work is captured. Nothing may be under way on the device that waits for other ranks."""
        torch.cuda.synchronize(self._device)
        gc.collect()
        # What was kept for work that graphs do from here on: they have memory of their own.
        torch.cuda.empty_cache()
        was_enabled = gc.isenabled()
        gc.disable()  # it might free tensors in the middle of a capture
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            if was_enabled:
                gc.enable()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def capture(self, work: Work, memory: Hashable) -> Work:
        """What queues again all that the work queues now. It is not done yet.

        Args:
            work: to be captured.
            memory: the same for graphs that share it.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process, such as NCCL's, may go on asking the device what they ask.
        graph.capture_begin(pool=self._pools[memory], capture_error_mode="thread_local")
        work()
        graph.capture_end()
        return graph.replay


def graphs_for(device: torch.device) -> HostGraphs | CudaGraphs:
    """The graphs of a device."""
    return CudaGraphs(device) if is_gpu(device) else HostGraphs()
