"""The same step for many placements at once: the planner's inner loop.

A schedule in which every member holds experts of every layer has the tasks of all placements, in the one order that
``Schedule`` gives. It is compiled once to a list of operations on arrays [tracks, candidates]; where a member of
a candidate holds none, its E task ends at minus infinity, so it takes no time and nothing waits for it. Zebra's
order is static, so a step is a longest path and needs no event queue. It is the event simulator's time (tests hold the
two equal) but for two things: transfers that share a link with the opposite channel are not slowed down, which
only happens where attention ranks hold experts; and where queueing tasks costs hosts something, they do so in one order
(``program.compile_queueing``), of which ``simulator.queueing`` may take a task before another one (tests say how near that is).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_hetermoe.cost.group import GroupCosts
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.simulator.program import PRICED, Program, compile_program, compile_queueing
from megatron_hetermoe.simulator.queueing import waits_for_sizes

if TYPE_CHECKING:
    import numpy as np


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
    return step_ends(group, experts, schedule, wave, microbatches)[1]


def step_ends(
    group: GroupCosts, experts: np.ndarray, schedule: str = "zebra", wave: int | None = None,
    microbatches: int | None = None,
) -> np.ndarray:
    """``step_seconds``, and when the last task of an attention rank ends before reductions and optimizer.

    Returns:
        [2, candidates]: tasks of attention ranks, the step.
    """
    import numpy as np

    shape = group.shape
    order = schedule, shape.layers, shape.moe_layers, microbatches or group.step.microbatches, wave
    if group.has_host:
        on_attention = experts[:, :, :group.attention_members].any(axis=(1, 2))
        if on_attention.any() and not on_attention.all():
            ends = np.empty((2, len(experts)))
            for chosen in (on_attention, ~on_attention):
                ends[:, chosen] = step_ends(group, experts[chosen], schedule, wave, microbatches)
            return ends
    tracks = _tracks(group, experts)
    owners = sum(track < group.attention_members for track in tracks)
    counts = experts[:, :, tracks].transpose(1, 2, 0)  # [K, tracks, candidates]
    prices = [_prices(group, experts, counts, tracks, of) for of in PRICED]
    if group.has_host:
        takes = counts > 0
        takes[:, :owners] = True
        hosts = [_host_prices(group, counts, takes, tracks[:owners], tracks, of) for of in PRICED]
        clock, sent = _run_queued(compile_queueing(*order, bool(on_attention.any())), prices, hosts, counts, owners)
    else:
        clock, sent = _run(compile_program(*order), prices, counts, owners)
    tasks = clock[:owners].max(axis=0)
    for layer, end in sent.items():  # a member reduces its gradients after all its tasks, transfers among them
        clock = np.where(counts[layer] > 0, np.maximum(clock, end), clock)
    held_by = experts.sum(axis=1)[:, tracks].astype(int).T
    reduction = _each(held_by, lambda row, pairs: group.reduction(tracks[row], pairs))
    optimizer = _each(held_by, lambda row, pairs: group.optimizer(tracks[row], pairs))
    return np.array([tasks, (clock + reduction).max(axis=0) + optimizer.max(axis=0)])


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


def _host_prices(
    group: GroupCosts, counts: np.ndarray, takes: np.ndarray, owners: list[int], tracks: list[int], of: Task
) -> list[np.ndarray]:
    """In what time the tracks' hosts queue tasks of a kind and pass, by layer: [owners, 1] of attention, else [tracks, candidates],
    with 0 for those that have none. Which take part in a layer's transfers, ``takes`` says, [K, tracks, candidates]."""
    import numpy as np

    way = 0 if of.direction is Pass.FORWARD else 1
    if of.kind is Kind.ATTENTION:
        return list(np.array([group.host_attention[track][way] for track in owners]).T[:, :, None])
    if of.kind is Kind.EXPERT:
        unit, task = (np.array([group.host_experts[track][part][way] for track in tracks])[None, :, None] for part in (0, 1))
        return list(np.where(counts > 0, counts * unit + task, 0.0))
    return list(takes * np.array([group.host_transfer(track, of.kind) for track in tracks])[None, :, None])


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
    clock_of_owners = clock[:owners]
    channels = [np.zeros(counts.shape[2]) for _ in range(2)]
    streams = [int(of.stream is Stream.BACK) for of in PRICED]
    ends: list[np.ndarray | None] = [None] * program.results
    sent: dict[int, np.ndarray] = {}
    last_of_owners, last = _last(owners), _last(len(clock))
    always = [bool(layer.all()) for layer in counts]
    # All arrays are small, so what a step takes is the number of operations on them: they are done in place.
    for kind, which, layer, number, transfers, computed in program.operations:
        price = prices[which][layer]
        if kind is Kind.ATTENTION:
            for transfer in transfers:
                maximum(clock_of_owners, ends[transfer], out=clock_of_owners)
            clock_of_owners += price
            ends[number] = last_of_owners(clock_of_owners)
        elif kind is Kind.EXPERT:
            end = clock if always[layer] else clock.copy()
            for transfer in transfers:
                maximum(end, ends[transfer], out=end)
            end += price
            ends[number] = last(end)
            if end is not clock:
                maximum(clock, end, out=clock)
        else:
            start = channels[streams[which]]
            for other in computed:
                start = maximum(start, ends[other])
            channels[streams[which]] = ends[number] = sent[layer] = start + price
    return clock, sent


def _run_queued(
    program: Program, prices: list[list[np.ndarray]], hosts: list[list[np.ndarray]], counts: np.ndarray, owners: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """As ``_run``, where a task starts no earlier than each host that takes part has queued it, of which each queues its own one
    after the other in the program's order; a dispatch when its sizes are known.

    Args:
        hosts: for each of PRICED, by layer, as of ``_host_prices``.
    """
    import numpy as np

    maximum = np.maximum
    clock, host = np.zeros(counts.shape[1:]), np.zeros(counts.shape[1:])
    clock_of_owners, host_of_owners = clock[:owners], host[:owners]
    first = 0 if counts[:, :owners].any() else owners  # track that holds experts
    clock_of_holders, host_of_holders = clock[first:], host[first:]
    channels = [np.zeros(counts.shape[2]) for _ in range(2)]
    streams, sized = [int(of.stream is Stream.BACK) for of in PRICED], [waits_for_sizes(of) for of in PRICED]
    ends: list[np.ndarray | None] = [None] * program.results
    sent: dict[int, np.ndarray] = {}
    last_of_owners, last_of_holders, last = _last(owners), _last(len(clock_of_holders)), _last(len(clock))
    always = [bool(layer[first:].all()) for layer in counts]
    never = _absences(counts, owners)
    # All arrays are small, so what a step takes is the number of operations on them: they are done in place.
    for kind, which, layer, number, transfers, computed in program.operations:
        price, queueing = prices[which][layer], hosts[which][layer]
        if kind is Kind.ATTENTION:
            host_of_owners += queueing
            maximum(clock_of_owners, host_of_owners, out=clock_of_owners)
            for transfer in transfers:
                maximum(clock_of_owners, ends[transfer], out=clock_of_owners)
            clock_of_owners += price
            ends[number] = last_of_owners(clock_of_owners)
        elif kind is Kind.EXPERT:
            host_of_holders += queueing[first:]
            end = maximum(clock_of_holders, host_of_holders, out=clock_of_holders if always[layer] else None)
            for transfer in transfers:
                maximum(end, ends[transfer], out=end)
            end += price[first:]
            ends[number] = last_of_holders(end)
            if end is not clock_of_holders:
                maximum(clock_of_holders, end, out=clock_of_holders)
        else:
            absent = never[layer]
            if sized[which]:
                known = ends[computed[0]]  # of its A task, whose owners' hosts all take part
                maximum(host, known if absent is None else known + absent, out=host)
                computed = ()
            host += queueing
            start = last(host if absent is None else host + absent)
            maximum(start, channels[streams[which]], out=start)
            for other in computed:
                maximum(start, ends[other], out=start)
            start += price
            channels[streams[which]] = ends[number] = sent[layer] = start
    return clock, sent


def _absences(counts: np.ndarray, owners: int) -> list[np.ndarray | None]:
    """By layer what, added to its hosts' times, [tracks, candidates], leaves out those that have no part in its transfers: minus
    infinity for holders of other layers; None where all take part."""
    import numpy as np

    found: list[np.ndarray | None] = []
    for layer in counts:
        absent = np.where(layer > 0, 0.0, -np.inf)
        absent[:owners] = 0.0
        found.append(absent if absent.any() else None)
    return found


def _last(rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """What finds the greatest of [rows, candidates], [candidates] in an array of its own: of few rows, which is usual, without
    what a reduction costs."""
    import numpy as np

    if rows == 1:
        return lambda ends: ends[0].copy()
    return (lambda ends: np.maximum(ends[0], ends[1])) if rows == 2 else np.maximum.reduce


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
