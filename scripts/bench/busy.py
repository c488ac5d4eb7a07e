"""How long a GPU computed, from a profiler's trace of its kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Kernel(NamedTuple):
    """One run of a kernel: its name, and seconds of the profiler's clock."""

    name: str
    start: float
    end: float


def kernels_of(trace: dict) -> list[Kernel]:
    """The kernels of a trace as ``torch.profiler`` exports it for Chrome, whose times are microseconds."""
    return [
        Kernel(event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in trace["traceEvents"] if event.get("cat") == "kernel"
    ]


def busy_seconds(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Seconds in which at least one kernel ran: of those that compute, and of those that move data between ranks."""
    kernels = list(kernels)
    return {
        name: union((kernel.start, kernel.end) for kernel in kernels if _moves(kernel) == moves)
        for name, moves in (("compute", False), ("nccl", True))
    }


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what the intervals (start, end) cover together."""
    total, covered = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total


def _moves(kernel: Kernel) -> bool:
    """NCCL's kernels, which wait for peers too, and what a throttled transfer waits in."""
    return kernel.name.startswith("nccl") or "spin_kernel" in kernel.name
