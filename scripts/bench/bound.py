"""What computing alone takes, by the prices: the shortest step if all else were free, and each role's part of one.

No transfer, no wait for one, no ramp, no gradient reduction and no optimizer are in these figures, so a measured step is
compared with them without its optimizer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from megatron_hetermoe.cost.group import GroupCosts
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT

_PASSES = (0, 1)  # forward, backward


def disaggregated(group: GroupCosts) -> float:
    """Seconds of the shortest step with all attention on the attention members, and the experts of each layer wherever they
    end first (the best Asym-EA): of the member that has most, on a placement with no member longer than that.

    Args:
        group: a ZP group's prices, with merged gradients of weights where those are meant (``GroupCosts.amortised``).
    """
    pairs = group.shape.experts * len(group.shape.moe_layers)
    members = range(group.members)
    least = max(_member(group, member, 0) for member in members)
    possible = {_member(group, member, held) for member in members for held in range(1, pairs + 1)} | {least}
    ends = sorted(seconds for seconds in possible if seconds >= least)
    first = bisect_left(ends, pairs, key=lambda seconds: sum(_room(group, member, seconds, pairs) for member in members))
    return ends[first] * group.step.microbatches


def expert_parallel(group: GroupCosts, batch: int) -> float:
    """Seconds that the same ranks compute in a step of expert parallelism, where all wait for the slowest in every task.

    Args:
        group: a ZP group of all ranks.
        batch: sequences of the step; shared evenly, in parts too where ranks do not divide it.
    """
    ranks = group.members
    every = replace(group, attention_members=ranks, groups=1, tensor=1, merged=0)
    held = -(-group.shape.experts // ranks)
    seconds = 0.0
    for way in _PASSES:
        seconds += sum(max(of_task) for of_task in zip(*(passes[way] for passes in every.attention)))
        seconds += len(group.shape.moe_layers) * max(every.expert_seconds(member, way, held) for member in range(ranks))
    return seconds * batch / ranks / group.step.micro_batch


def by_role(group: GroupCosts, experts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Seconds that a member of each role computes in a step, on average.

    Args:
        group: as for ``disaggregated``.
        experts: [layers x members], how many of a layer's experts a member holds.
    """
    m = group.attention_members
    seconds = [
        group.step.microbatches * (_attention(group, member) + sum(
            group.expert_seconds(member, way, int(of_layer[member])) for of_layer in experts for way in _PASSES))
        for member in range(group.members)
    ]
    return {ATTENTION: sum(seconds[:m]) / m, EXPERT: sum(seconds[m:]) / (group.members - m)}


def _attention(group: GroupCosts, member: int) -> float:
    """Seconds of a member's A tasks of one microbatch."""
    return sum(map(sum, group.attention[member])) if member < group.attention_members else 0.0


def _member(group: GroupCosts, member: int, held: int) -> float:
    """Seconds of a member's tasks of one microbatch, where it holds so many (layer, expert) pairs in as few layers as can be."""
    layers = -(-held // group.shape.experts)
    return _attention(group, member) + sum(
        layers * group.expert_task[member][way] + held * group.expert[member][way] for way in _PASSES)


def _room(group: GroupCosts, member: int, seconds: float, pairs: int) -> int:
    """How many (layer, expert) pairs a member can hold in that time."""
    low, high = 0, pairs
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _member(group, member, middle) <= seconds else (low, middle - 1)
    return low
