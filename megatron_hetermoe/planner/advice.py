"""What to compare a plan with, and what to do where nothing fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.step import RECOMPUTE, Step
from megatron_hetermoe.cost.cluster import Cluster, Kind
from megatron_hetermoe.cost.group import GroupCosts, seats_of
from megatron_hetermoe.planner.asym_ea import counts_of, long_step_seconds
from megatron_hetermoe.planner.memory import MARGIN, member_memory, usable
from megatron_hetermoe.planner.options import MOST_MEMBERS, Question, options
from megatron_hetermoe.planner.search import Priced, fits, search, smaller
from megatron_hetermoe.simulator.baselines import (
    Pipeline, expert_parallel_tokens_per_second, group_tokens, ideal_seconds, pipeline, pipelines, spread,
)
from megatron_hetermoe.simulator.host import BUSY
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT

_FEW = 12  # layouts that are simulated, of a plan that another one is compared with
_MORE_NODES = 64  # times the nodes that there are, up to which more are tried


@dataclass(frozen=True)
class Alone:
    """A pool by itself with stock expert parallelism.

    Attributes:
        pool: its name.
        tokens_per_second: of the whole pool, None where the model does not fit.
        expert_parallel: its size.
    """

    pool: str
    tokens_per_second: float | None
    expert_parallel: int | None


def alone(question: Question, cluster: Cluster, kinds: Mapping[str, Kind]) -> list[Alone]:
    """What each pool would do without the others."""
    result = []
    for name, pool in cluster.pools.items():
        best, size_of_best = None, None
        for size in range(1, min(pool.gpus, MOST_MEMBERS) + 1):
            # A step's batch is divided as it comes; this is a comparison, no plan.
            if pool.gpus % size or size > question.shape.experts:
                continue
            microbatches = max(1, question.global_batch // question.micro_batch // pool.gpus)
            seats = seats_of([name] * size, cluster, kinds)
            step = Step(question.micro_batch, microbatches, question.vocabulary, distributed_optimizer=True)
            group = GroupCosts(question.shape, step, seats, size, pool.gpus // size, question.precision)
            held = spread(group, range(size)).experts_held(0)
            for recompute in RECOMPUTE:  # stock Megatron has all of them; the least that fits is the fastest
                group = replace(group, step=replace(step, recompute=recompute))
                if not kinds[name].has_recompute(recompute) \
                        or member_memory(group, 0, held, 1).total > usable(group, 0):
                    continue
                speed = expert_parallel_tokens_per_second(group, seats * (pool.gpus // size), size)
                if best is None or speed > best:
                    best, size_of_best = speed, size
                break
        result.append(Alone(name, best, size_of_best))
    return result


def larger_microbatches(
    question: Question, cluster: Cluster, kinds: Mapping[str, Kind], best: Priced
) -> dict[int, Priced]:
    """Where hosts queue tasks for most of the best plan's step, good plans with two and four times as many sequences a
    microbatch, by that number, as far as the batch divides, they fit and are faster."""
    found: dict[int, Priced] = {}
    if max(best.queueing(role) for role in (ATTENTION, EXPERT)) < BUSY:
        return found
    for size in (2 * question.micro_batch, 4 * question.micro_batch):
        if question.global_batch % size:
            break
        others = search(replace(question, micro_batch=size).plain, cluster, kinds, most=_FEW).best
        if others and others[0].tokens_per_second > best.tokens_per_second:
            found[size] = others[0]
    return found


def with_attention_alone(best: Priced, alones: Sequence[Alone]) -> Plan:
    """The plan, with what the pools of its attention ranks would do alone beside its own prediction."""
    plan = best.plan()
    names = {name for name, _ in best.option.attention}
    speeds = [one.tokens_per_second for one in alones if one.pool in names and one.tokens_per_second]
    return replace(plan, predicted=replace(plan.predicted, attention_alone=sum(speeds) if speeds else None))


@dataclass(frozen=True)
class OtherWay:
    """Another way to use the plan's GPUs.

    Attributes:
        name: in words.
        tokens_per_second: as if nothing kept it from running.
        obstacle: what does, in a few words; None for nothing, and for the ideal, which nobody runs.
    """

    name: str
    tokens_per_second: float
    obstacle: str | None = None

    @property
    def runs(self) -> bool:
        """Whether it could be had instead of the plan."""
        return self.obstacle is None and self.name != IDEAL


IDEAL = "ideal sum of pools"  # each alone by expert parallelism


def baselines(best: Priced) -> list[OtherWay]:
    """Other ways to use the same GPUs, stock Megatron's with the least recomputation that fits, and what keeps them from it."""
    option, group = best.option, best.option.group
    m, copies = option.m, option.groups * len(option.stages)
    seats = (*group.seats[:m], *(seat for seat in group.seats[m:] for _ in range(group.expert_tensor)))
    every = replace(group, seats=seats, expert_tensor=1)
    tokens = group_tokens(every) * copies
    even = spread(every, range(m, every.members))
    recomputing = [replace(every, step=replace(every.step, recompute=recompute, distributed_optimizer=True))
                   for recompute in RECOMPUTE if all(seat.kind.has_recompute(recompute) for seat in seats)]
    parallel = next((one for one in recomputing if _expert_parallel_fits(one, copies)), None)
    staged = next((one for choice in recomputing for one in sorted(pipelines(choice), key=lambda one: one.seconds)
                   if _pipeline_fits(choice, one, copies)), None)
    without = _without_bf16(every)
    return [
        OtherWay("expert parallelism over all ranks", copies * expert_parallel_tokens_per_second(parallel or every, seats),
                 without or _unless(parallel)),
        OtherWay("naive disaggregation", tokens / float(long_step_seconds(every, counts_of(even), 1)[0]),
                 _unless(_all_fit(every, range(m), 0) and _all_fit(every, range(m, every.members), even.experts_held(m)))),
        OtherWay("pipeline, best split of layers", tokens / (staged or pipeline(every)).seconds, without or _unless(staged)),
        OtherWay(IDEAL, tokens / ideal_seconds(every)),
    ]


def _unless(fits: object) -> str | None:
    return None if fits else "does not fit"


def _without_bf16(group: GroupCosts) -> str | None:
    """The pools that cannot train in bf16, where that is to be: stock Megatron has attention on all ranks."""
    if group.precision != "bf16":
        return None
    pools = dict.fromkeys(seat.pool.name for seat in group.seats if not seat.kind.bf16)
    return f"no bf16: {', '.join(pools)}" if pools else None


def _all_fit(group: GroupCosts, members: range, experts: int, wave: float = 1) -> bool:
    """Whether members of a group have room for so many (layer, expert) pairs each."""
    distinct = {group.seats[member].pool.name: member for member in members}.values()
    return all(member_memory(group, member, experts, wave).total <= usable(group, member) for member in distinct)


def _expert_parallel_fits(group: GroupCosts, copies: int) -> bool:
    ranks = group.members
    every = replace(group, attention_members=ranks, groups=copies, tensor=1, context=1)
    return _all_fit(every, range(ranks), -(-group.shape.experts // ranks) * len(group.shape.moe_layers))


def _pipeline_fits(group: GroupCosts, found: Pipeline, copies: int) -> bool:
    """Whether every stage's ranks have room for its layers, with a microbatch on the way for each stage from it on."""
    seats, first, stages = list(group.seats), 0, len(found.layers)
    for stage, (ranks, layers) in enumerate(zip(found.ranks, found.layers)):
        of = group.shape.of_layers(range(first + 1, first + layers + 1))
        own, seats, first = tuple(seats[:ranks]), seats[ranks:], first + layers
        part = replace(group, shape=of, seats=own, attention_members=ranks, groups=copies, tensor=1, context=1, expert_tensor=1,
                       stage=stage, stages=stages)
        if not _all_fit(part, range(ranks), -(-of.experts // ranks) * len(of.moe_layers), stages - stage):
            return False
    return True


def nothing_fits(question: Question, cluster: Cluster, kinds: Mapping[str, Kind]) -> list[str]:
    """Why no layout holds the model, one sentence each, with the nearest that would."""
    found = list(options(question, cluster, kinds))
    if not found:
        sequences = question.global_batch // question.micro_batch
        if question.precision == "bf16" and not any(kind.bf16 for kind in kinds.values()):
            return ["no pool has bf16, which attention is to be in: train with --fp16"]
        return [f"no layout of {cluster.gpus} GPUs fits a global batch of {sequences} microbatches: it must divide by "
                f"the number of attention ranks, and at least one GPU must be left for experts"]
    best = min(found, key=lambda option: option.shortfall() * option.groups)
    lacking = best.shortfall()
    problems = [
        f"the model fits no layout of {cluster.origin} (a margin of {MARGIN:.0%} of each GPU is left free): the "
        f"nearest, {best.describe()}, lacks " + (f"{lacking / 1e9:.1f} GB over the {best.m + best.n} GPUs of a ZP group"
                                         if lacking > 0 else "room on single ranks")
    ]
    ways = []
    low, high = 0, question.shape.decoder_layers - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(smaller(question, middle), cluster, kinds) else (low, middle - 1)
    if low:
        ways.append(f"{low} layers in place of {question.shape.decoder_layers}")
    for name in cluster.pools:
        more = _nodes_needed(question, cluster, kinds, name)
        if more:
            ways.append(f"{more} nodes of {name} in place of {cluster.pools[name].nodes}")
    problems.append("what would fit: " + "; or ".join(ways) if ways else
                    "neither fewer layers nor more nodes of one pool would fit: take GPUs with more memory, a smaller "
                    "micro batch or shorter sequences")
    return problems


def _nodes_needed(question: Question, cluster: Cluster, kinds: Mapping[str, Kind], name: str) -> int | None:
    """The fewest nodes of a pool, others as they are, with which something fits; None where no number helps."""
    def with_nodes(nodes: int) -> Cluster:
        return Cluster({**cluster.pools, name: replace(cluster.pools[name], nodes=nodes)}, cluster.origin)

    low, high = cluster.pools[name].nodes, cluster.pools[name].nodes
    while high <= _MORE_NODES * cluster.pools[name].nodes:
        high *= 2
        if fits(question, with_nodes(high), kinds):
            break
        low = high
    else:
        return None
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(question, with_nodes(middle), kinds) else (middle, high)
    return high
