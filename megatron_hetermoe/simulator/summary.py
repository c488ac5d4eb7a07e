"""What a step says, simulated or recorded: how busy each pool is, where time is lost, and how far from the bound it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hetermoe.schedule.orders import Schedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.simulator.events import MemberResult, Result
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT

# Causes of idle time on a compute stream.
RAMP = "ramp"  # before a member's first task of a wave
TURN = "turn"  # between a member's last forward and first backward of a wave
CHANNEL = "channel"  # what the next task waits for was on its way
OTHER_POOL = "other pool"  # what the next task waits for was not computed yet
HOST = "host"  # the host had not queued the next task, or the transfer that it waits for
STAGE = "other stage"  # what the next task waits for, another pipeline stage had not handed over
TAIL = "tail"  # after its last task, until the slowest member has ended too
CAUSES = (RAMP, TURN, CHANNEL, OTHER_POOL, STAGE, HOST, TAIL)


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
    sendable = _sendable(result)
    known: dict[int, MemberSummary] = {}  # members that share a result share this too
    for member in result.members:
        if id(member) not in known:
            computes = sorted(
                ((task, *times) for task, times in member.times.items() if task.stream is Stream.COMPUTE),
                key=lambda entry: entry[1],
            )
            known[id(member)] = MemberSummary(
                sum(end - start for _, start, end in computes),
                _bubbles(member, computes, result.schedule, last, sendable),
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


def _sendable(result: Result) -> dict[Task, float]:
    """When the last of what each transfer carries was computed, on whatever member, but for what other stages hand over; empty
    where hosts are not counted."""
    if not any(member.queued for member in result.members):
        return {}
    computed: dict[Task, float] = {}
    transfers: set[Task] = set()
    for member in {id(member): member for member in result.members}.values():
        for task, (_, end) in member.times.items():
            if task.stream is Stream.COMPUTE:
                computed[task] = max(end, computed.get(task, 0.0))
            else:
                transfers.add(task)
    carried = {task: [computed[wait] for wait in result.schedule.dependencies(task) if wait in computed] for task in transfers}
    return {task: max(ends) for task, ends in carried.items() if ends}


def _bubbles(
    member: MemberResult, computes: list[tuple[Task, float, float]], schedule: Schedule, last: float, sendable: dict[Task, float]
) -> dict[str, float]:
    """The gaps of one compute stream by cause; they and the tasks add up to ``last``."""
    causes = dict.fromkeys(CAUSES, 0.0)
    wave_of = {microbatch: index for index, wave in enumerate(schedule.waves) for microbatch in wave}
    begun: set[int] = set()  # waves
    turned: set[int] = set()
    free = _free(member) if sendable else {}
    clock = 0.0
    for task, start, end in computes:
        wave = wave_of[task.microbatch]
        turns = task.kind is Kind.EXPERT and task.direction is Pass.BACKWARD and wave not in turned
        gap = start - clock
        if gap > 0:
            if wave not in begun:
                causes[RAMP] += gap
            elif turns:
                causes[TURN] += gap
            else:
                for cause, seconds in _waited(member, task, clock, start, schedule, sendable, free).items():
                    causes[cause] += seconds
        clock = end
        begun.add(wave)
        if turns:
            turned.add(wave)
    causes[TAIL] += last - clock
    return causes


def _waited(
    member: MemberResult, task: Task, clock: float, start: float, schedule: Schedule, sendable: dict[Task, float],
    free: dict[Task, float],
) -> dict[str, float]:
    """What a compute task waited for from ``clock`` on, by cause: for its last transfer to begin, for what that carries to be
    computed or for a host to queue it; then for that to arrive; then for its own host."""
    waits = schedule.dependencies(task)
    arrivals = {wait: member.times[wait] for wait in waits if wait in member.times and wait.stream is not Stream.COMPUTE}
    latest = max(arrivals, key=lambda wait: arrivals[wait][1], default=None)
    sent, arrived = arrivals[latest] if latest else (start, start)
    begins = max(clock, min(sent, start))
    queued = member.queued.get(task, (0.0, 0.0))[1]
    own = min(start, queued) - max(clock, arrived if latest else clock)
    late = begins - max(clock, sendable[latest], free[latest]) if latest in sendable else 0.0
    own, late = max(0.0, own), max(0.0, late)
    on_way = start - begins - (own if latest else 0.0)
    before = start - clock - on_way - own - late
    return {CHANNEL: on_way, HOST: own + late,
            STAGE if any(wait.kind is Kind.HANDOVER for wait in waits) else OTHER_POOL: before}


def _free(member: MemberResult) -> dict[Task, float]:
    """For each transfer when the one before it on its stream had ended."""
    ends: dict[Stream, float] = {}
    free = {}
    for task, (_, end) in sorted(member.times.items(), key=lambda entry: entry[1]):
        if task.stream is not Stream.COMPUTE:
            free[task] = ends.get(task.stream, 0.0)
            ends[task.stream] = end
    return free
