"""What a simulated step says: how busy each pool is, where time is lost, and how far from the bound it ends."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.simulator.events import Result
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT

# Causes of idle time on a compute stream.
RAMP = "ramp"  # before a member's first task of a wave
TURN = "turn"  # between a member's last forward and first backward of a wave
CHANNEL = "channel"  # what the next task waits for was on its way
OTHER_POOL = "other pool"  # what the next task waits for was not computed yet
TAIL = "tail"  # after its last task, until the slowest member has ended too
CAUSES = (RAMP, TURN, CHANNEL, OTHER_POOL, TAIL)


@dataclass(frozen=True)
class RoleSummary:
    """A role's members, on average.

    Attributes:
        busy: share of the step in which they compute A and E tasks.
        bubbles: for each of CAUSES, seconds.
        work: seconds of A and E tasks of the member that has most.
    """

    busy: float
    bubbles: dict[str, float]
    work: float


@dataclass(frozen=True)
class Summary:
    """One step.

    Attributes:
        seconds: of the step.
        roles: by role.
        bound: seconds that no schedule could beat with these tasks: the work of the member that has most, with its
            gradient reduction and optimizer step.
        distance: how much longer the step is, as a share of the bound.
        after: seconds from the last task to the end: gradient reduction and optimizer.
    """

    seconds: float
    roles: dict[str, RoleSummary]
    bound: float
    distance: float
    after: float


def summarise(result: Result) -> Summary:
    """The summary of a simulated step."""
    schedule = result.schedule
    last = max(max((end for _, end in member.times.values()), default=0.0) for member in result.members)
    works, bubbles, bound = [], [], 0.0
    known: dict[int, tuple[float, dict[str, float]]] = {}  # members that share a result share these too
    for member in result.members:
        if id(member) not in known:
            computes = sorted(
                ((task, *times) for task, times in member.times.items() if task.stream is Stream.COMPUTE),
                key=lambda entry: entry[1],
            )
            work = sum(end - start for _, start, end in computes)
            known[id(member)] = (work, _bubbles(member.times, computes, schedule, last))
        work, causes = known[id(member)]
        works.append(work)
        bubbles.append(causes)
        after = sum(end - start for start, end in (member.reduced, member.stepped))
        bound = max(bound, work + after)
    roles = {}
    m = schedule.attention_members
    for role, members in ((ATTENTION, range(m)), (EXPERT, range(m, len(result.members)))):
        if members:
            count = len(members)
            roles[role] = RoleSummary(
                sum(works[member] for member in members) / count / result.seconds,
                {cause: sum(bubbles[member][cause] for member in members) / count for cause in CAUSES},
                max(works[member] for member in members),
            )
    return Summary(result.seconds, roles, bound, result.seconds / bound - 1, result.seconds - last)


def _bubbles(
    times: dict[Task, tuple[float, float]], computes: list[tuple[Task, float, float]], schedule, last: float
) -> dict[str, float]:
    """The gaps of one compute stream by cause; they and the tasks add up to ``last``."""
    causes = dict.fromkeys(CAUSES, 0.0)
    wave_of = {microbatch: index for index, wave in enumerate(schedule.waves) for microbatch in wave}
    clock, before = 0.0, None
    for task, start, end in computes:
        gap = start - clock
        if gap > 0:
            arrivals = [times[wait] for wait in schedule.dependencies(task)
                        if wait in times and wait.stream is not Stream.COMPUTE]
            if before is None or wave_of[before.microbatch] != wave_of[task.microbatch]:
                causes[RAMP] += gap
            elif task.kind is Kind.EXPERT and task.direction is Pass.BACKWARD and before.direction is Pass.FORWARD:
                causes[TURN] += gap
            else:
                sent = max((arrival for arrival in arrivals), key=lambda times: times[1], default=(start, start))[0]
                on_way = start - max(clock, min(sent, start))
                causes[CHANNEL] += on_way
                causes[OTHER_POOL] += gap - on_way
        clock, before = end, task
    causes[TAIL] += last - clock
    return causes
