"""A schedule as a list of operations, for ``simulator.fast``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_hetermoe.schedule.orders import MemberSchedule, Schedule, build
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.topology.placement import Placement

PRICED = tuple(Task(kind, way, 1, 0) for kind in (Kind.ATTENTION, Kind.EXPERT, Kind.DISPATCH, Kind.COMBINE)
               for way in (Pass.FORWARD, Pass.BACKWARD))  # one for each kind and pass that has prices of its own


@dataclass(frozen=True)
class Program:
    """A schedule as operations in an order in which each comes after all that it waits for.

    Attributes:
        operations: kind, which of PRICED it is, layer from 0 on, index of the result, indexes of the transfers and of the E
            tasks waited for.
        results: how many there are.
    """

    operations: tuple[tuple[Kind, int, int, int, tuple[int, ...], tuple[int, ...]], ...]
    results: int


@lru_cache(maxsize=64)
def compile_program(
    schedule: str, layers: int, moe_layers: tuple[int, ...], microbatches: int, wave: int | None
) -> Program:
    """Compiles the order of a member that has all tasks. All others' are this one without what they do not have, so
    they run on it with masks."""
    member = _of_group(schedule, layers, moe_layers, microbatches, wave, 0).member(0)
    return _compiled(_topological(member), member.waits.__getitem__)


@lru_cache(maxsize=64)
def compile_queueing(
    schedule: str, layers: int, moe_layers: tuple[int, ...], microbatches: int, wave: int | None, on_attention: bool
) -> Program:
    """The same in the order in which hosts queue tasks, which is another where attention ranks hold experts, as
    ``on_attention`` says (``Schedule.issue_order``)."""
    of_group = _of_group(schedule, layers, moe_layers, microbatches, wave, 0 if on_attention else 1)
    members = [of_group.member(member) for member in ((0,) if on_attention else (0, 1))]
    return _compiled(_queueing_order(of_group, members), of_group.dependencies)


def _of_group(
    schedule: str, layers: int, moe_layers: tuple[int, ...], microbatches: int, wave: int | None, holder: int
) -> Schedule:
    """The schedule of a ZP group of an attention member, 0, and another one, 1, of which one holds the experts."""
    held = Placement(tuple((holder,) if layer in moe_layers else () for layer in range(1, layers + 1)), 2)
    return build(schedule, layers, held, 1, microbatches, wave)


def _compiled(tasks: Iterable[Task], waits_of: Callable[[Task], tuple[Task, ...]]) -> Program:
    index: dict[Task, int] = {}
    which = {(of.kind, of.direction): number for number, of in enumerate(PRICED)}
    operations = []
    for number, task in enumerate(tasks):
        index[task] = number
        waits = waits_of(task)
        transfers = tuple(index[wait] for wait in waits if wait.stream is not Stream.COMPUTE)
        # An A task's other waits are on its own stream and before it; a transfer's are what it carries.
        computed = tuple(index[wait] for wait in waits if wait.stream is Stream.COMPUTE) \
            if task.stream is not Stream.COMPUTE else ()
        operations.append((task.kind, which[task.kind, task.direction], task.layer - 1, number, transfers, computed))
    return Program(tuple(operations), len(index))


def _topological(member: MemberSchedule) -> Iterator[Task]:
    """All streams merged, each in its order, every task after what it waits for."""
    at = dict.fromkeys(member.streams, 0)
    done: set[Task] = set()
    progress = True
    while progress:
        progress = False
        for stream, order in member.streams.items():
            while at[stream] < len(order) and done.issuperset(member.waits[order[at[stream]]]):
                task = order[at[stream]]
                done.add(task)
                at[stream] += 1
                progress = True
                yield task
    assert len(done) == sum(map(len, member.streams.values()))


def _queueing_order(of_group: Schedule, members: Iterable[MemberSchedule]) -> Iterator[Task]:
    """Transfers one after the other as they are issued, and a member's compute tasks each as soon as what it waits for is
    queued: so a host that waits for the sizes of a dispatch has nothing else that it could queue."""
    computes = [deque(member.streams[Stream.COMPUTE]) for member in members]
    queued: set[Task] = set()
    for transfer in (None, *(task for task in of_group.issue_order() if task.stream is not Stream.COMPUTE)):
        if transfer is not None:
            queued.add(transfer)
            yield transfer
        for order in computes:
            while order and queued.issuperset(of_group.dependencies(order[0])):
                queued.add(order[0])
                yield order.popleft()
    assert not any(computes)
