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
    expert_parallel_tokens_per_second, group_tokens, ideal_seconds, pipeline, spread,
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


def baselines(best: Priced) -> dict[str, float]:
    """Tokens a second of other ways to use the same GPUs, memory not counted: an upper bound on each."""
    option, group = best.option, best.option.group
    m, copies = option.m, option.groups * len(option.stages)
    seats = (*group.seats[:m], *(seat for seat in group.seats[m:] for _ in range(group.expert_tensor)))
    every = replace(group, seats=seats, expert_tensor=1)
    tokens = group_tokens(every) * copies
    even = spread(every, range(m, every.members))
    return {
        "expert parallelism over all ranks": copies * expert_parallel_tokens_per_second(every, seats),
        "naive disaggregation": tokens / float(long_step_seconds(every, counts_of(even), 1)[0]),
        "pipeline, best split of layers": tokens / pipeline(every).seconds,
        "ideal sum of pools": tokens / ideal_seconds(every),
    }


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
