"""What must hold of every schedule: dependencies, one order a channel, no deadlock, of one stage and of several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from megatron_hetermoe.schedule.orders import Schedule, transfers_between
from megatron_hetermoe.schedule.pipeline import StageSchedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task


def violations(schedule: Schedule) -> list[str]:
    """Everything that is wrong with a schedule, one sentence each; empty for one that can run.

    The proof of progress is a run in which a task starts as soon as it heads its stream, all that it reads is done,
    and, for a transfer, as soon as it heads that channel on every member that takes part, which is as strict as
    a transport without buffers. If that run ends, none can deadlock: starting a task never keeps another from
    starting, so any other run can only be at a point that this one passes.
    """
    members = {member: schedule.member(member) for member in range(schedule.placement.members)}
    problems = []
    for stream in (Stream.OUT, Stream.BACK):
        for pair in combinations(members, 2):
            one, other = transfers_between(schedule, stream, pair)
            if one != other:
                problems.append(f"members {pair} see channel {stream.value} in different orders")
    parts: dict[Task, set[int]] = {}
    for member, orders in members.items():
        for stream, order in orders.streams.items():
            if len(set(order)) != len(order):
                problems.append(f"member {member} has a task twice on stream {stream.value}")
            for task in order:
                if task.stream is not stream:
                    problems.append(f"member {member} has {task} on stream {stream.value}")
                parts.setdefault(task, set()).add(member)
    problems += [
        f"{task} waits for {dependency}, which no member has"
        for task in parts for dependency in schedule.dependencies(task) if dependency not in parts
    ]
    done: set[Task] = set()
    for task in schedule.issue_order():
        problems += [f"{task} is issued before {dependency}" for dependency in schedule.dependencies(task)
                     if dependency not in done]
        done.add(task)
    if done != parts.keys():
        problems.append(f"{len(done ^ parts.keys())} tasks are issued that no member has, or the other way round")
    return problems or _stuck(schedule, parts) + _unissued(schedule)


def _stuck(schedule: Schedule, parts: dict[Task, set[int]]) -> list[str]:
    """The heads of all streams when nothing can start any more, if tasks are left."""
    queues = {
        (member, stream): list(reversed(order))
        for member in range(schedule.placement.members)
        for stream, order in schedule.member(member).streams.items()
    }
    finished: dict[Task, set[int]] = {task: set() for task in parts}

    def ready(task: Task, member: int) -> bool:
        needed = schedule.dependencies(task)
        if task.stream is Stream.COMPUTE:
            return all(member in finished[dependency] for dependency in needed)
        heads = all(queues[other, task.stream][-1:] == [task] for other in parts[task])
        return heads and all(finished[dependency] == parts[dependency] for dependency in needed)

    progress = True
    while progress:
        progress = False
        for (member, stream), queue in queues.items():
            while queue and ready(queue[-1], member):
                task = queue[-1]
                for taker in {member} if stream is Stream.COMPUTE else parts[task]:
                    queues[taker, stream].pop()
                    finished[task].add(taker)
                progress = True
    return [
        f"member {member} is stuck on stream {stream.value} before {queue[-1]}"
        for (member, stream), queue in queues.items() if queue
    ]


def _unissued(schedule: Schedule) -> list[str]:
    """Tasks that a member's host never gets to queue, if each stream's thread waits for what it must queue before."""
    problems = []
    for member in range(schedule.placement.members):
        orders = schedule.member(member)
        queues = [list(reversed(order)) for order in orders.streams.values()]
        issued: set[Task] = set()
        while any(
            queue and issued.issuperset((*orders.waits[queue[-1]], *orders.issued_before.get(queue[-1], ())))
            and not issued.add(queue.pop())
            for queue in queues
        ):
            pass
        problems += [f"member {member} never gets to queue {queue[-1]}" for queue in queues if queue]
    return problems


def handover_violations(stages: Sequence[StageSchedule]) -> list[str]:
    """What keeps stages from getting through together, one sentence each, for stages that are each without fault.

    The proof of progress is the strictest run: each stage issues its tasks one after the other, and a transfer between
    two stages only when both are at it.
    """
    queues = [list(reversed(tuple(stage.issue_order()))) for stage in stages]
    progress = True
    while progress:
        progress = False
        waiting: dict[tuple[int, bool, Pass, int], list[Task]] = {}
        for stage, queue in zip(stages, queues):
            while queue and queue[-1].kind is not Kind.HANDOVER:
                queue.pop()
                progress = True
            if queue:
                waiting[(*stage.place(queue[-1]), queue[-1].direction, queue[-1].microbatch)] = queue
        for (part, is_end, *of), queue in waiting.items():
            other = waiting.get((part + 1, False, *of))
            if is_end and other:
                queue.pop()
                other.pop()
                progress = True
    return [f"stage {number} is stuck before {queue[-1]}" for number, queue in enumerate(queues) if queue]
