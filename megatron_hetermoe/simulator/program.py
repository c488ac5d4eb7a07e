"""A schedule as a list of operations, for ``simulator.fast``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_hetermoe.schedule.orders import Order, Schedule, build
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.topology.placement import Placement

PRICED = tuple(Task(kind, way, 1, 0) for kind in (Kind.ATTENTION, Kind.EXPERT, Kind.DISPATCH, Kind.COMBINE)
               for way in (Pass.FORWARD, Pass.BACKWARD))  # one for each kind and pass that has prices of its own

Operation = tuple[Kind, int, int, int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Program:
    """A schedule as operations in an order in which each comes after all that it waits for.

    Attributes:
        operations: kind, which of PRICED it is, layer from 0 on, index of the result, indexes of the transfers that a
            compute task waits for, and of the compute task whose result a transfer carries.
        results: how many there are.
    """

    operations: tuple[Operation, ...]
    results: int


@lru_cache(maxsize=64)
def compile_program(
    schedule: str, layers: int, moe_layers: tuple[int, ...], microbatches: int, wave: int | None
) -> Program:
    """Compiles the order of a member that has all tasks. All others' are this one without what they do not have, so
    they run on it with masks."""
    of_group = _of_group(schedule, layers, moe_layers, microbatches, wave, 0)
    waits = _waits(of_group)
    return _compiled(_topological(of_group.streams_of(0), waits), waits)


@lru_cache(maxsize=64)
def compile_queueing(
    schedule: str, layers: int, moe_layers: tuple[int, ...], microbatches: int, wave: int | None, on_attention: bool
) -> Program:
    """The same in the order in which hosts queue tasks, which is another where attention ranks hold experts, as
    ``on_attention`` says (``Schedule.issue_order``)."""
    of_group = _of_group(schedule, layers, moe_layers, microbatches, wave, 0 if on_attention else 1)
    waits = _waits(of_group)
    computes = [of_group.computes_of(member) for member in ((0,) if on_attention else (0, 1))]
    return _compiled(_queueing_order(computes, waits), waits)


def _of_group(
    schedule: str, layers: int, moe_layers: tuple[int, ...], microbatches: int, wave: int | None, holder: int
) -> Schedule:
    """The schedule of a ZP group of an attention member, 0, and another one, 1, of which one holds the experts."""
    held = Placement(tuple((holder,) if layer in moe_layers else () for layer in range(1, layers + 1)), 2)
    return build(schedule, layers, held, 1, microbatches, wave)


def _waits(of_group: Schedule) -> dict[Task, Order]:
    """What each task of the ZP group waits for, tasks as they are issued."""
    return {task: of_group.dependencies(task) for task in of_group.issue_order()}


def _compiled(tasks: Iterable[Task], waits: Mapping[Task, Order]) -> Program:
    index: dict[Task, int] = {}
    which = {(of.kind, of.direction): number for number, of in enumerate(PRICED)}
    on_compute = [of.stream is Stream.COMPUTE for of in PRICED]
    operations: list[Operation] = []
    for number, task in enumerate(tasks):
        index[task] = number
        sort = which[task.kind, task.direction]
        before = tuple(index[wait] for wait in waits[task])
        transfers, computed = (), before
        if on_compute[sort]:
            # What else it waits for is on its own stream and before it.
            transfers, computed = tuple(other for other in before if not on_compute[operations[other][1]]), ()
        operations.append((task.kind, sort, task.layer - 1, number, transfers, computed))
    return Program(tuple(operations), len(index))


def _topological(streams: Mapping[Stream, Order], waits: Mapping[Task, Order]) -> Iterator[Task]:
    """All streams merged, each in its order, every task after what it waits for."""
    at = dict.fromkeys(streams, 0)
    done: set[Task] = set()
    progress = True
    while progress:
        progress = False
        for stream, order in streams.items():
            while at[stream] < len(order) and done.issuperset(waits[order[at[stream]]]):
                task = order[at[stream]]
                done.add(task)
                at[stream] += 1
                progress = True
                yield task
    assert len(done) == sum(map(len, streams.values()))


def _queueing_order(computes: Iterable[Order], waits: Mapping[Task, Order]) -> Iterator[Task]:
    """Transfers one after the other as they are issued, and a member's compute tasks each as soon as what it waits for is
    queued: so a host that waits for the sizes of a dispatch has nothing else that it could queue."""
    orders = [deque(order) for order in computes]
    queued: set[Task] = set()
    for transfer in (None, *(task for task in waits if task.stream is not Stream.COMPUTE)):
        if transfer is not None:
            queued.add(transfer)
            yield transfer
        for order in orders:
            while order and queued.issuperset(waits[order[0]]):
                queued.add(order[0])
                yield order.popleft()
    assert not any(orders)
