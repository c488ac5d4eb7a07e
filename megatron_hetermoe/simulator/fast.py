"""The same step for many placements at once: the planner's inner loop.

A schedule in which every member holds experts of every layer has the tasks of all placements, in the one order that
``Schedule`` gives. It is compiled once to a list of operations on arrays [tracks, candidates]; where a member of
a candidate holds none, its E task is masked: it takes no time, waits for nothing and nothing waits for it. Zebra's
order is static, so a step is a longest path and needs no event queue. It is the event simulator's time (tests hold the
two equal) but for one thing: transfers that share a link with the opposite channel are not slowed down, which
only happens where attention ranks hold experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from megatron_hetermoe.cost.tasks import GroupCosts
from megatron_hetermoe.schedule.orders import MemberSchedule, build
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.topology.placement import Placement

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Program:
    """A schedule as operations in an order in which each comes after all that it waits for.

    Attributes:
        operations: kind, pass, layer, index of the result, indexes of the transfers and of the E tasks waited for.
        results: how many there are.
    """

    operations: tuple[tuple[Kind, Pass, int, int, tuple[int, ...], tuple[int, ...]], ...]
    results: int


@lru_cache(maxsize=64)
def compile_program(
    schedule: str, layers: int, moe_layers: tuple[int, ...], microbatches: int, wave: int | None
) -> Program:
    """Compiles the order of a member that has all tasks. All others' are this one without what they do not have, so
    they run on it with masks."""
    everything = Placement(tuple((0,) if layer in moe_layers else () for layer in range(1, layers + 1)), 1)
    member = build(schedule, layers, everything, 1, microbatches, wave).member(0)
    order = list(_topological(member))
    index = {task: number for number, task in enumerate(order)}
    operations = []
    for number, task in enumerate(order):
        waits = member.waits[task]
        transfers = tuple(index[wait] for wait in waits if wait.stream is not Stream.COMPUTE)
        # An A task's other waits are on its own stream and before it; a transfer's are what it carries.
        computed = tuple(index[wait] for wait in waits if wait.stream is Stream.COMPUTE) \
            if task.stream is not Stream.COMPUTE else ()
        operations.append((task.kind, task.direction, task.layer, number, transfers, computed))
    return Program(tuple(operations), len(order))


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


def step_seconds(
    group: GroupCosts, experts: np.ndarray, schedule: str = "zebra", wave: int | None = None,
    microbatches: int | None = None,
) -> np.ndarray:
    """Seconds of a step under many placements.

    Args:
        group: the ZP group's costs.
        experts: [candidates, K, members], how many experts each member holds in each layer; all 0 for a dense layer.
        schedule, wave: as in a plan.
        microbatches: of the step; those of the group's step if None.

    Returns:
        [candidates]
    """
    import numpy as np

    shape, owners = group.shape, group.attention_members
    program = compile_program(schedule, shape.layers, shape.moe_layers, microbatches or group.step.microbatches, wave)
    tracks = _tracks(group, experts)
    attention = [track for track in tracks if track < owners]
    held = experts[:, :, tracks].transpose(1, 2, 0) > 0  # [K, tracks, candidates]
    price = {}
    for way, index in ((Pass.FORWARD, 0), (Pass.BACKWARD, 1)):
        unit, task = (np.array([of[track][index] for track in tracks]) for of in (group.expert, group.expert_task))
        counts = experts[:, :, tracks].transpose(1, 2, 0)
        price[Kind.EXPERT, way] = counts * unit[None, :, None] + (counts > 0) * task[None, :, None]
        price[Kind.ATTENTION, way] = np.array([group.attention[track][index] for track in attention]).T[:, :, None]
        for kind in (Kind.DISPATCH, Kind.COMBINE):
            stream = Task(kind, way, 1, 0).stream
            links = group.link_seconds(kind, stream, experts)
            price[kind, way] = (group.latency + links.max(axis=(-1, -2))).T  # [K, candidates]
    clock = np.zeros((len(tracks), len(experts)))  # of each compute stream
    channels = {Stream.OUT: np.zeros(len(experts)), Stream.BACK: np.zeros(len(experts))}
    ends: list[np.ndarray | None] = [None] * program.results
    sent: dict[int, np.ndarray] = {}  # the end of each layer's last transfer
    count = len(attention)
    always = [layer.all() for layer in held]
    for kind, way, layer, number, transfers, computed in program.operations:
        if kind is Kind.ATTENTION:
            start = clock[:count]
            for transfer in transfers:
                start = np.maximum(start, ends[transfer])
            clock[:count] = start + price[kind, way][layer - 1]
            ends[number] = clock[:count].max(axis=0)
        elif kind is Kind.EXPERT:
            end = clock
            for transfer in transfers:
                end = np.maximum(end, ends[transfer])
            end = end + price[kind, way][layer - 1]
            if always[layer - 1]:
                clock = end
                ends[number] = end.max(axis=0)
            else:
                mask = held[layer - 1]
                clock = np.where(mask, end, clock)
                ends[number] = np.where(mask, end, 0.0).max(axis=0)
        else:
            stream = Stream.OUT if (kind is Kind.DISPATCH) == (way is Pass.FORWARD) else Stream.BACK
            start = channels[stream]
            for other in (*transfers, *computed):
                start = np.maximum(start, ends[other])
            channels[stream] = ends[number] = sent[layer] = start + price[kind, way][layer - 1]
    for layer, end in sent.items():  # a member reduces its gradients after all its tasks, transfers among them
        clock = np.where(held[layer - 1], np.maximum(clock, end), clock)
    held_by = experts.sum(axis=1)[:, tracks].astype(int).T
    reduction = _each(held_by, lambda row, pairs: group.reduction(tracks[row], pairs))
    optimizer = _each(held_by, lambda row, pairs: group.optimizer(tracks[row], pairs))
    return (clock + reduction).max(axis=0) + optimizer.max(axis=0)


def _each(held_by: np.ndarray, price: Callable[[int, int], float]) -> np.ndarray:
    """price(track, pairs) for an array [tracks, candidates] of pairs, each combination priced once."""
    import numpy as np

    result = np.empty(held_by.shape)
    for row, pairs in enumerate(held_by):
        values, back = np.unique(pairs, return_inverse=True)
        result[row] = np.array([price(row, int(value)) for value in values])[back]
    return result


def _tracks(group: GroupCosts, experts: np.ndarray) -> list[int]:
    """One member of each set that has the same role, pool and experts in all candidates, attention members first."""
    alike: dict[tuple, int] = {}
    for member, seat in enumerate(group.seats):
        key = (member < group.attention_members, seat.pool.name, experts[:, :, member].tobytes())
        alike.setdefault(key, member)
    return sorted(alike.values())
