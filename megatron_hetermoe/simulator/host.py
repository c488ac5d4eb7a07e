"""What queueing tasks costs the host of a rank with a GPU, and whether it keeps ahead of the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_hetermoe.schedule.trace import Span

_HIGH = 0.95
_MUCH = 0.05  # of a step that GPUs wait for hosts
_OFTEN = 0.25  # of the tasks to which a GPU comes before they are queued
BUSY = 0.8  # of a step that a host queues tasks, from which on it may be what the step takes
WAY_OUT = "each task that the host queues should be more work: raise --micro-batch-size or take longer sequences; " \
          "--hetermoe-cuda-graphs queues attention by one launch"


@dataclass(frozen=True)
class HostCost:
    """Of the compute tasks of a role's ranks in a recorded step.

    Attributes:
        tasks: how many there are.
        median, high: seconds in which the host queued one, the 95th percentile beside the median.
        lead: seconds by which the host was ahead, in the median (``Span.lead``).
        late: share of them at which the GPU arrived before the host had queued all of it, so that it may have waited.
    """

    tasks: int
    median: float
    high: float
    lead: float
    late: float

    def __str__(self) -> str:
        median, high, lead = (f"{1e6 * seconds:,.0f} µs" for seconds in (self.median, self.high, self.lead))
        return (f"the host queues a task in {median} (95% of {self.tasks} within {high}), {lead} before the GPU comes to it; "
                f"the GPU came to {self.late:.1%} before they were queued")


def host_costs(spans: Iterable[Span], roles: Mapping[int, str]) -> dict[str, HostCost]:
    """By role; nothing for ranks that compute on the CPU.

    Args:
        spans: of one step.
        roles: of each rank.
    """
    of_role: dict[str, list[Span]] = {}
    for span in spans:
        if span.queued is not None:
            of_role.setdefault(roles[span.rank], []).append(span)
    return {role: _cost(found) for role, found in sorted(of_role.items())}


def advice(costs: Iterable[HostCost], waited: float) -> str | None:
    """What to do where GPUs wait for hosts, one sentence; None where they hardly do.

    Args:
        costs: of the roles of a recorded step.
        waited: share of the step that some compute stream waits for a host (``summary.HOST``).
    """
    if waited < _MUCH and not any(cost.late >= _OFTEN for cost in costs):
        return None
    return f"GPUs wait for hosts: {WAY_OUT}"


def _cost(spans: list[Span]) -> HostCost:
    seconds = sorted(end - start for start, end in (span.queued for span in spans))
    leads = [span.lead for span in spans]
    return HostCost(
        len(spans), statistics.median(seconds), seconds[min(len(seconds) - 1, int(_HIGH * len(seconds)))],
        statistics.median(leads), sum(lead < 0 for lead in leads) / len(leads),
    )
