"""What else could be done with the same GPUs: expert parallelism, naive disaggregation, pipelines, the ideal sum.

Each gives seconds for the same number of tokens as the plan it is compared with, so throughputs compare by their
inverse. All use the same prices. Where it has a schedule, it is one of ``schedule.orders``: expert parallelism is
one in which every rank is an attention rank and a holder, one microbatch at a time. What queueing transfers costs a host is
known of this package's only, so stock Megatron's ways are no faster than their hosts queue attention and experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_hetermoe.config.plan import TOGETHER
from megatron_hetermoe.cost.group import GroupCosts, Seat
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.schedule.orders import build, sequential
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task
from megatron_hetermoe.simulator.events import simulate
from megatron_hetermoe.topology.placement import Placement


def spread(group: GroupCosts, holders: Sequence[int]) -> Placement:
    """Experts spread over holders in blocks, as evenly as can be."""
    base, extra = divmod(group.shape.experts, len(holders))
    layer = tuple(holder for index, holder in enumerate(holders) for _ in range(base + (index < extra)))
    return Placement(
        tuple(layer if number in group.shape.moe_layers else () for number in range(1, group.shape.layers + 1)),
        group.members,
    )


def zebra_seconds(
    group: GroupCosts, placement: Placement, schedule: str = "zebra", wave: int | None = None, weight_gradients: str = TOGETHER
) -> float:
    """The plan itself, or with ``sequential`` naive disaggregation (the paper's DistEP): one step."""
    orders = build(schedule, group.shape.layers, placement, group.attention_members, group.step.microbatches, wave,
                   weight_gradients=weight_gradients)
    return simulate(orders, TaskCosts(group, placement, weight_gradients)).seconds


def expert_parallel_tokens_per_second(
    group: GroupCosts, seats: Sequence[Seat], experts_group: int | None = None
) -> float:
    """Stock expert parallelism over ranks that all do attention and hold experts: the slowest sets the pace.

    Args:
        group: prices of shape and step; its own seats do not matter.
        seats: the ranks.
        experts_group: ranks over which one set of experts is spread; all of them if None.

    Returns:
        tokens a second of these ranks.
    """
    size = experts_group or len(seats)
    assert len(seats) % size == 0
    sets = [tuple(seats[first:first + size]) for first in range(0, len(seats), size)]
    slowest = 0.0
    for chosen in dict.fromkeys(sets):
        microbatches = 2  # a step's microbatches follow one another; two tell one from what comes once a step
        every = replace(group, seats=chosen, attention_members=size, groups=len(sets), tensor=1, context=1,
                        step=replace(group.step, microbatches=microbatches), hosts_count=False)
        placement = spread(every, range(size))
        result = simulate(sequential(group.shape.layers, placement, size, microbatches), TaskCosts(every, placement))
        last = max(max(end for _, end in member.times.values()) for member in result.members)
        once = result.seconds - last
        queueing = TaskCosts(replace(every, hosts_count=group.hosts_count), placement)
        each = max(last / microbatches, *map(queueing.host_computes, range(size)))
        slowest = max(slowest, each * group.step.microbatches + once)
    return len(seats) * group.step.microbatches * group.step.micro_batch * group.shape.sequence / slowest


def expert_parallel_seconds(group: GroupCosts) -> float:
    """Stock expert parallelism over all ranks of the group, for the tokens of the group's step."""
    return group_tokens(group) / expert_parallel_tokens_per_second(group, group.seats)


def ideal_seconds(group: GroupCosts) -> float:
    """The ideal sum of pools: each kind alone trains by expert parallelism, and their throughputs are added
    (the paper's EP (Ideal)). No memory limit and no cost of being together is counted."""
    pools: dict[str, list[Seat]] = {}
    for seat in group.seats:
        pools.setdefault(seat.pool.name, []).append(seat)
    return group_tokens(group) / sum(
        expert_parallel_tokens_per_second(group, seats) for seats in pools.values()
    )


def group_tokens(group: GroupCosts) -> int:
    """Tokens that one ZP group takes in a step."""
    return group.replicas * group.step.microbatches * group.step.micro_batch * group.shape.sequence


@dataclass(frozen=True)
class Pipeline:
    """A pipeline with its best split of layers.

    Attributes:
        seconds: for the tokens of the group's step.
        stages: of each pool, in order.
        ranks, layers: of each stage.
        microbatches: that go through it.
    """

    seconds: float
    stages: tuple[int, ...]
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    microbatches: int


def pipeline(group: GroupCosts) -> Pipeline:
    """The fastest of ``pipelines``."""
    return min(pipelines(group), key=lambda found: found.seconds)


def pipelines(group: GroupCosts) -> list[Pipeline]:
    """Heterogeneity-aware pipeline parallelism: each pool has stages of its own, with as many layers as suit its speed.

    The ranks of a pool are divided evenly into its stages, in their order, so those of a node stay together; those of a stage
    share a microbatch's sequences and spread the experts over each other. 1F1B takes (microbatches - 1) of the slowest
    stage and each stage once; then gradients are reduced and the optimizer steps.

    Assumptions, which favour the pipeline: a microbatch's sequences can be split over any number of ranks, and activations
    between stages cost nothing. With slow links it can be faster than the ideal sum of pools, which is expert parallelism
    over more ranks.

    Returns:
        one for all numbers of stages that divide the pools, with the best split of layers by dynamic programming.
    """
    shape, step = group.shape, group.step
    pools: dict[str, list[Seat]] = {}
    for seat in group.seats:
        pools.setdefault(seat.pool.name, []).append(seat)
    total = group_tokens(group) // shape.sequence  # sequences of the step
    found = []
    for stages in _stage_choices([len(pool) for pool in pools.values()], shape.layers):
        parts = [_from_node_0(pool[first:first + len(pool) // count]) for pool, count in zip(pools.values(), stages)
                 for first in range(0, len(pool), len(pool) // count)]
        width = min(max(map(len, parts)) * step.micro_batch, total)
        microbatches = total // width
        priced = {part: _Stage.of(group, part, width) for part in dict.fromkeys(parts)}
        seconds, layers = _best_split([priced[part] for part in parts], shape.layers, microbatches)
        found.append(Pipeline(seconds, stages, tuple(map(len, parts)), layers, microbatches))
    return found


def _from_node_0(seats: Sequence[Seat]) -> tuple[Seat, ...]:
    """The same on the first nodes: what a stage takes does not depend on which nodes it has."""
    nodes = list(dict.fromkeys(seat.node for seat in seats))
    return tuple(replace(seat, node=nodes.index(seat.node)) for seat in seats)


def _stage_choices(sizes: list[int], layers: int) -> list[tuple[int, ...]]:
    """Numbers of stages for each pool: those that divide it, with no more stages than layers."""
    choices: list[tuple[int, ...]] = [()]
    for size in sizes:
        choices = [(*chosen, count) for chosen in choices for count in range(1, size + 1) if size % count == 0]
    return [chosen for chosen in choices if sum(chosen) <= layers] or [tuple(1 for _ in sizes)]


@dataclass(frozen=True)
class _Stage:
    """What a stage's ranks take, in seconds.

    Attributes:
        layer: one layer, forward and backward, of a microbatch; no less than its host takes to queue it.
        begin, end: of a microbatch, what the first stage has beside layers, and the last one: the embedding; the head and
            what predicts further tokens.
        once: for each layer, what comes once a step.
    """

    layer: float
    begin: float
    end: float
    once: float

    @classmethod
    def of(cls, group: GroupCosts, seats: tuple[Seat, ...], width: int) -> _Stage:
        """Those of some seats, with ``width`` sequences in a microbatch."""
        ranks, shape = len(seats), group.shape
        stage = replace(group, seats=seats, attention_members=ranks, groups=1, tensor=1, context=1, expert_tensor=1)
        costs = TaskCosts(stage, spread(stage, range(ranks)))
        number = shape.moe_layers[0]
        # Priced for micro_batch sequences a rank; the stage has width of them.
        share = width / (ranks * group.step.micro_batch)

        def attention(layer: int) -> float:
            return share * sum(max(stage.attention[member][way][layer - 1] for member in range(ranks)) for way in (0, 1))

        layer = attention(middle := min(number + 1, shape.layers))
        for way in (Pass.FORWARD, Pass.BACKWARD):
            layer += share * max(costs.seconds(member, Task(Kind.EXPERT, way, number, 0)) for member in range(ranks))
            for kind in (Kind.DISPATCH, Kind.COMBINE):
                price = costs.transfer(Task(kind, way, number, 0))
                layer += price.latency + share * price.seconds if ranks > 1 else 0.0
        layer = max(layer, *(cls._queueing(costs, member, middle, number) for member in range(ranks)))
        further = sum(attention(one) - attention(middle) for one in range(shape.decoder_layers + 1, shape.layers + 1))
        once = max(costs.reduction(member) + costs.optimizer(member) for member in range(ranks))
        return cls(layer, max(0.0, attention(1) - attention(middle)), attention(shape.layers + 1) + further, once / shape.layers)


    @staticmethod
    def _queueing(costs: TaskCosts, member: int, attention: int, experts: int) -> float:
        """Seconds in which a member's host queues the A task of one layer and the E task of another, both passes."""
        return sum(costs.host_seconds(member, Task(kind, way, layer, 0)) for way in (Pass.FORWARD, Pass.BACKWARD)
                   for kind, layer in ((Kind.ATTENTION, attention), (Kind.EXPERT, experts)))


def _best_split(stages: Sequence[_Stage], layers: int, microbatches: int) -> tuple[float, tuple[int, ...]]:
    """The split of layers, at least one a stage, for which 1F1B ends first.

    For each possible slowest stage the others may be as long as it is: with that limit on every stage, the sum of all
    is least when layers go where they are cheapest.
    """
    times, extra = [stage.layer for stage in stages], [0.0] * len(stages)
    extra[0] += stages[0].begin
    extra[-1] += stages[-1].end
    limits = sorted({time * count + more for time, more in zip(times, extra) for count in range(1, layers + 1)})
    best: tuple[float, tuple[int, ...]] | None = None
    for limit in limits:
        most = [int((limit - more) / time + 1e-9) for time, more in zip(times, extra)]
        if min(most) < 1 or sum(most) < layers:
            continue
        split = [1] * len(times)
        for stage in sorted(range(len(times)), key=lambda index: times[index]):
            split[stage] += min(most[stage] - 1, layers - sum(split))
        stage_times = [time * count + more for time, count, more in zip(times, split, extra)]
        once = max(stage.once * count for stage, count in zip(stages, split))
        seconds = sum(stage_times) + (microbatches - 1) * max(stage_times) + once
        if best is None or seconds < best[0]:
            best = (seconds, tuple(split))
    assert best is not None
    return best
