"""What a step says, simulated or recorded: how busy each pool is, where time is lost, and how far from the bound it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.simulator.events import Result
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT

# Causes of idle time on a compute stream.
RAMP = "ramp"  # before a member's first task of a wave
TURN = "turn"  # between a member's last forward and first backward of a wave
CHANNEL = "channel"  # what the next task waits for was on its way
OTHER_POOL = "other pool"  # what the next task waits for was not computed yet
STAGE = "other stage"  # what the next task waits for, another pipeline stage had not handed over
TAIL = "tail"  # after its last task, until the slowest member has ended too
CAUSES = (RAMP, TURN, CHANNEL, OTHER_POOL, STAGE, TAIL)


@dataclass(frozen=True)
class MemberSummary:
    """One member of a ZP group.

    Attributes:
        work: seconds of A and E tasks.
        bubbles: for each of CAUSES, seconds; they and the work add up to the group's last task's end.
        after: seconds of gradient reduction and optimizer step.
    """

    work: float
    bubbles: dict[str, float]
    after: float


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
    """One step of one ZP group, of each pipeline stage.

    Attributes:
        seconds: of the step.
        roles: by role.
        stages: the same of each pipeline stage; empty where there is one.
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
    stages: tuple[dict[str, RoleSummary], ...] = ()

    @property
    def by_name(self) -> dict[str, RoleSummary]:
        """By role, and behind each role by pipeline stage."""
        found = {}
        for name, role in self.roles.items():
            found[name] = role
            found |= {f"{name}, stage {stage}": roles[name] for stage, roles in enumerate(self.stages, start=1)}
        return found


def summarise(*results: Result) -> Summary:
    """The summary of a step, of one ZP group in each pipeline stage."""
    last = max(map(_last_task, results))
    of_stages = [summarise_members(result, last) for result in results]
    bound = max(member.work + member.after for members in of_stages for member in members)
    m, seconds = results[0].schedule.attention_members, results[0].seconds

    def by_role(stages: Sequence[list[MemberSummary]]) -> dict[str, RoleSummary]:
        pools = {ATTENTION: [member for members in stages for member in members[:m]],
                 EXPERT: [member for members in stages for member in members[m:]]}
        return {role: _on_average(members, seconds) for role, members in pools.items() if members}

    stages = tuple(by_role([members]) for members in of_stages) if len(of_stages) > 1 else ()
    return Summary(seconds, by_role(of_stages), bound, seconds / bound - 1, seconds - last, stages)


def summarise_members(result: Result, last: float | None = None) -> list[MemberSummary]:
    """The summary of each member of a ZP group.

    Args:
        result: of the group.
        last: when the last task of all stages ends; where it is not given, the group's.
    """
    last = _last_task(result) if last is None else last
    known: dict[int, MemberSummary] = {}  # members that share a result share this too
    for member in result.members:
        if id(member) not in known:
            computes = sorted(
                ((task, *times) for task, times in member.times.items() if task.stream is Stream.COMPUTE),
                key=lambda entry: entry[1],
            )
            known[id(member)] = MemberSummary(
                sum(end - start for _, start, end in computes),
                _bubbles(member.times, computes, result.schedule, last),
                sum(end - start for start, end in (member.reduced, member.stepped)),
            )
    return [known[id(member)] for member in result.members]


def _last_task(result: Result) -> float:
    """When a group's last task ends, in seconds."""
    return max(max((end for _, end in member.times.values()), default=0.0) for member in result.members)


def _on_average(members: list[MemberSummary], seconds: float) -> RoleSummary:
    count = len(members)
    return RoleSummary(
        sum(member.work for member in members) / count / seconds,
        {cause: sum(member.bubbles[cause] for member in members) / count for cause in CAUSES},
        max(member.work for member in members),
    )


def _bubbles(
    times: dict[Task, tuple[float, float]], computes: list[tuple[Task, float, float]], schedule, last: float
) -> dict[str, float]:
    """The gaps of one compute stream by cause; they and the tasks add up to ``last``."""
    causes = dict.fromkeys(CAUSES, 0.0)
    wave_of = {microbatch: index for index, wave in enumerate(schedule.waves) for microbatch in wave}
    begun: set[int] = set()  # waves
    turned: set[int] = set()
    clock = 0.0
    for task, start, end in computes:
        wave = wave_of[task.microbatch]
        turns = task.kind is Kind.EXPERT and task.direction is Pass.BACKWARD and wave not in turned
        gap = start - clock
        if gap > 0:
            arrivals = [times[wait] for wait in schedule.dependencies(task)
                        if wait in times and wait.stream is not Stream.COMPUTE]
            if wave not in begun:
                causes[RAMP] += gap
            elif turns:
                causes[TURN] += gap
            else:
                sent = max((arrival for arrival in arrivals), key=lambda times: times[1], default=(start, start))[0]
                waited = STAGE if any(wait.kind is Kind.HANDOVER for wait in schedule.dependencies(task)) else OTHER_POOL
                on_way = start - max(clock, min(sent, start))
                causes[CHANNEL] += on_way
                causes[waited] += gap - on_way
        clock = end
        begun.add(wave)
        if turns:
            turned.add(wave)
    causes[TAIL] += last - clock
    return causes
