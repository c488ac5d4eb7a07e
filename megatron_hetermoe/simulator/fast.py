"""The same step for many placements at once: the planner's inner loop.

A schedule in which every member holds experts of every layer has the tasks of all placements, in the one order that
``Schedule`` gives. It is compiled once to a list of operations on arrays [tracks, candidates]; where a member of
a candidate holds none, its E task ends at minus infinity, so it takes no time and nothing waits for it. Zebra's
order is static, so a step is a longest path and needs no event queue. It is the event simulator's time (tests hold the
two equal) but for one thing: transfers that share a link with the opposite channel are not slowed down, which
only happens where attention ranks hold experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from megatron_hetermoe.cost.group import GroupCosts
from megatron_hetermoe.schedule.orders import MemberSchedule, build
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.topology.placement import Placement

if TYPE_CHECKING:
    import numpy as np


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
    everything = Placement(tuple((0,) if layer in moe_layers else () for layer in range(1, layers + 1)), 1)
    member = build(schedule, layers, everything, 1, microbatches, wave).member(0)
    order = list(_topological(member))
    index = {task: number for number, task in enumerate(order)}
    which = {(of.kind, of.direction): number for number, of in enumerate(PRICED)}
    operations = []
    for number, task in enumerate(order):
        waits = member.waits[task]
        transfers = tuple(index[wait] for wait in waits if wait.stream is not Stream.COMPUTE)
        # An A task's other waits are on its own stream and before it; a transfer's are what it carries.
        computed = tuple(index[wait] for wait in waits if wait.stream is Stream.COMPUTE) \
            if task.stream is not Stream.COMPUTE else ()
        operations.append((task.kind, which[task.kind, task.direction], task.layer - 1, number, transfers, computed))
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

    shape = group.shape
    program = compile_program(schedule, shape.layers, shape.moe_layers, microbatches or group.step.microbatches, wave)
    tracks = _tracks(group, experts)
    owners = sum(track < group.attention_members for track in tracks)
    counts = experts[:, :, tracks].transpose(1, 2, 0)  # [K, tracks, candidates]
    prices = [_prices(group, experts, counts, tracks, of) for of in PRICED]
    clock, sent = _run(program, prices, counts, owners)
    for layer, end in sent.items():  # a member reduces its gradients after all its tasks, transfers among them
        clock = np.where(counts[layer] > 0, np.maximum(clock, end), clock)
    held_by = experts.sum(axis=1)[:, tracks].astype(int).T
    reduction = _each(held_by, lambda row, pairs: group.reduction(tracks[row], pairs))
    optimizer = _each(held_by, lambda row, pairs: group.optimizer(tracks[row], pairs))
    return (clock + reduction).max(axis=0) + optimizer.max(axis=0)


def _prices(group: GroupCosts, experts: np.ndarray, counts: np.ndarray, tracks: list[int], of: Task) -> list[np.ndarray]:
    """What tasks of a kind and pass take, by layer: [tracks or 1, candidates] of compute, [candidates] of a transfer."""
    import numpy as np

    way = 0 if of.direction is Pass.FORWARD else 1
    if of.kind is Kind.ATTENTION:
        owners = (track for track in tracks if track < group.attention_members)
        return list(np.array([group.attention[track][way] for track in owners]).T[:, :, None])
    if of.kind is Kind.EXPERT:
        unit, task = (np.array([each[track][way] for track in tracks])[None, :, None] for each in (group.expert, group.expert_task))
        return list(np.where(counts > 0, counts * unit + task, -np.inf))
    links = group.link_seconds(of.kind, of.stream, experts)
    return list((group.latency + links.max(axis=(-1, -2))).T)


def _run(
    program: Program, prices: list[list[np.ndarray]], counts: np.ndarray, owners: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Runs a program.

    Args:
        program: of all tasks.
        prices: for each of PRICED, by layer.
        counts: [K, tracks, candidates], experts that each track holds.
        owners: tracks of attention members, which come first.

    Returns:
        When each track's last compute task ends, [tracks, candidates], and for each layer from 0 on when its last transfer
        does, [candidates].
    """
    import numpy as np

    maximum = np.maximum
    clock = np.zeros(counts.shape[1:])  # of each compute stream
    channels = {Stream.OUT: np.zeros(counts.shape[2]), Stream.BACK: np.zeros(counts.shape[2])}
    streams = [of.stream for of in PRICED]
    ends: list[np.ndarray | None] = [None] * program.results
    sent: dict[int, np.ndarray] = {}
    always = [bool(layer.all()) for layer in counts]
    for kind, which, layer, number, transfers, computed in program.operations:
        price = prices[which][layer]
        if kind is Kind.ATTENTION:
            start = clock[:owners]
            for transfer in transfers:
                start = maximum(start, ends[transfer])
            clock[:owners] = end = start + price
            ends[number] = _last(end)
        elif kind is Kind.EXPERT:
            end = clock
            for transfer in transfers:
                end = maximum(end, ends[transfer])
            end = end + price
            ends[number] = _last(end)
            clock = end if always[layer] else maximum(clock, end)
        else:
            start = channels[streams[which]]
            for other in (*transfers, *computed):
                start = maximum(start, ends[other])
            channels[streams[which]] = ends[number] = sent[layer] = start + price
    return clock, sent


def _last(ends: np.ndarray) -> np.ndarray:
    """The greatest of [tracks, candidates], [candidates]: of few tracks, which is usual, without what a reduction costs."""
    import numpy as np

    if len(ends) == 1:
        return ends[0].copy()  # the clock is changed in place
    return np.maximum(ends[0], ends[1]) if len(ends) == 2 else np.maximum.reduce(ends)


def _each(held_by: np.ndarray, price: Callable[[int, int], float]) -> np.ndarray:
    """price(track, pairs) for an array [tracks, candidates] of pairs, each combination priced once."""
    import numpy as np

    result = np.empty(held_by.shape)
    for row, of_track in enumerate(held_by.tolist()):
        known = {pairs: price(row, pairs) for pairs in set(of_track)}
        result[row] = [known[pairs] for pairs in of_track]
    return result


def _tracks(group: GroupCosts, experts: np.ndarray) -> list[int]:
    """One member of each set that has the same role, pool and experts in all candidates, attention members first."""
    alike: dict[tuple, int] = {}
    for member, seat in enumerate(group.seats):
        key = (member < group.attention_members, seat.pool.name, experts[:, :, member].tobytes())
        alike.setdefault(key, member)
    return sorted(alike.values())
