"""The plan nearest to an earlier one for the ranks that are there now: some were lost, or some came.

What a checkpoint holds does not depend on the layout, so any will do; the nearest keeps what was tuned (ZP groups,
wave, how experts are shared between roles and kinds of GPU) and moves few experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.cost.cluster import Cluster, Kind
from megatron_hetermoe.cost.tasks import costs_of_plan
from megatron_hetermoe.planner.memory import in_flight, member_memory, usable
from megatron_hetermoe.topology.layout import layout_problems


@dataclass(frozen=True)
class Refit:
    """A plan for other ranks.

    Attributes:
        plan: for as many ranks of each role as it says, which may be fewer than are there.
        said: what is different, and which ranks stay idle, one sentence each.
    """

    plan: Plan
    said: tuple[str, ...]


def refit(plan: Plan, attention_ranks: int, expert_ranks: int, microbatches: int) -> Refit:
    """The nearest plan.

    Args:
        plan: the earlier one.
        attention_ranks, expert_ranks: that are there.
        microbatches: of a step, those of all attention ranks together: global over micro batch size.

    Raises:
        UsageError: when no layout is possible with them.
    """
    wrong = layout_problems(plan.attention_ranks, plan.expert_ranks, plan.groups, plan.tensor_parallel,
                            plan.expert_tensor_parallel, plan.context_parallel, plan.stages)
    if wrong:
        raise UsageError([f"the plan to start from is none: {problem}" for problem in wrong])
    if plan.context_parallel > 1:
        raise UsageError(["a plan with context parallelism is not fitted to other ranks yet: give ranks and "
                          "placement by hand"])
    if plan.stages > 1:
        raise UsageError([f"a plan with {plan.stages} pipeline stages is not fitted to other ranks yet: give ranks and "
                          "placement by hand"])
    a, n, groups = _layout(plan, attention_ranks, expert_ranks, microbatches)
    # Holders: an attention rank is one, and as many expert ranks together as share their experts' weights.
    together = plan.expert_tensor_parallel
    m_before, m = plan.attention_ranks // plan.groups, a // groups
    n_before, n_each = plan.expert_ranks // plan.groups // together, n // groups // together
    survivors = {i: i for i in range(min(m_before, m))}
    survivors |= {m_before + j: m + j for j in range(min(n_before, n_each))}
    placement = tuple(_placed(layer, survivors, (m_before, n_before), (m, n_each)) for layer in plan.placement)
    step = plan.step and replace(plan.step, microbatches=microbatches // _replicas(plan, a))
    pools = ()
    if plan.pools:
        attention, expert = plan.pools[:m_before], plan.pools[m_before:]
        pools = (*_extended(attention, m), *_extended(expert, n // groups))
    changed = replace(plan, attention_ranks=a, expert_ranks=n, groups=groups, placement=placement, step=step,
                      pools=pools)
    said = _said(plan, changed, survivors, (attention_ranks, expert_ranks), microbatches)
    return Refit(plan if changed == plan else replace(changed, predicted=None, tasks=None), said)


def within_memory(found: Refit, cluster: Cluster, kinds: Mapping[str, Kind]) -> Refit:
    """The same with a wave that fits the GPUs' memory, since a rank may have more experts than before.

    Args:
        found: of a plan that says its pools and step.
        cluster: the pools' GPUs, whatever number of them.
        kinds: their costs.

    Raises:
        UsageError: when a rank's experts do not fit even with one microbatch on the way.
    """
    plan = found.plan
    costs = costs_of_plan(plan, cluster, kinds)
    held = [costs.placement.experts_held(member) for member in range(costs.group.members)]

    def lacking(wave: int) -> dict[int, float]:
        """Bytes over what a plan may fill, by member."""
        there = in_flight(plan.schedule, wave, plan.step.microbatches, plan.model.layers)
        over = {member: member_memory(costs.group, member, held[member], there, weight_gradients=plan.weight_gradients).total
                - usable(costs.group, member)
                for member in range(costs.group.members)}
        return {member: size for member, size in over.items() if size > 0}

    before = plan.wave or plan.step.microbatches
    wave = next((wave for wave in range(before, 0, -1) if not lacking(wave)), None)
    if wave is None:
        member, size = max(lacking(1).items(), key=lambda item: item[1])
        raise UsageError([f"the model does not fit the ranks that are left: with {held[member]} experts of all layers a "
                          f"GPU of {plan.pools[member]} lacks {size / 1e9:.1f} GB; more ranks are needed"])
    if wave == before:
        return found
    return Refit(replace(plan, wave=wave),
                 (*found.said, f"{wave} microbatches on the way together in place of {before}, for memory"))


def _layout(plan: Plan, attention_ranks: int, expert_ranks: int, microbatches: int) -> tuple[int, int, int]:
    """Attention ranks, expert ranks and ZP groups: the most ranks, then the number of groups nearest to the plan's."""
    best = None
    holders = expert_ranks // plan.expert_tensor_parallel
    for groups in range(1, min(_replicas(plan, attention_ranks), holders) + 1):
        fitting = [copies for copies in range(groups, _replicas(plan, attention_ranks) + 1, groups)
                   if microbatches % copies == 0]
        if not fitting:
            continue
        a, n = max(fitting) * plan.tensor_parallel, holders // groups * groups * plan.expert_tensor_parallel
        key = (a + n, -abs(groups - plan.groups), -groups)
        if best is None or key > best[0]:
            best = key, (a, n, groups)
    if best is None:
        shared = (plan.tensor_parallel, plan.expert_tensor_parallel)
        least = "one of each role is" if shared == (1, 1) else f"{shared[0]} and {shared[1]} of them, which share weights, are"
        raise UsageError([f"{attention_ranks} attention and {expert_ranks} expert ranks make no layout for "
                          f"{microbatches} microbatches a step: at least {least} needed"])
    return best[1]


def _replicas(plan: Plan, attention_ranks: int) -> int:
    """Copies of the dense part that so many ranks have: each works on a microbatch of its own."""
    return attention_ranks // plan.tensor_parallel


def _placed(
    holders: Sequence[int], survivors: dict[int, int], before: tuple[int, int], now: tuple[int, int]
) -> tuple[int, ...]:
    """One layer's holders among the new members; experts stay where they can.

    Args:
        holders: by expert, among the members before.
        survivors: from members before to those now.
        before, now: M and N.
    """
    counts = Counter(holders)
    held = [counts[member] for member in range(sum(before))]
    on_attention = min(len(holders), round(sum(held[:before[0]]) * now[0] / before[0]))
    targets = []
    for total, start, size, offset, count in (
        (on_attention, 0, before[0], 0, now[0]), (len(holders) - on_attention, before[0], before[1], now[0], now[1]),
    ):
        weights = [0.0] * count
        of_role = held[start:start + size]
        mean = sum(of_role) / size
        for index in range(count):
            weights[index] = of_role[index] if index < size else mean
        targets += _apportioned(total, weights)
    result = [-1] * len(holders)
    room = list(targets)
    for expert, holder in enumerate(holders):
        member = survivors.get(holder, -1)
        if member >= 0 and room[member] > 0:
            result[expert], room[member] = member, room[member] - 1
    free = [member for member, count in enumerate(room) for _ in range(count)]
    return tuple(member if member >= 0 else free.pop(0) for member in result)


def _apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to a total, in proportion to weights; alike where all weights are 0."""
    if not any(weights):
        weights = [1.0] * len(weights)
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_rest = sorted(range(len(weights)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_rest[:total - sum(counts)]:
        counts[index] += 1
    return counts


def _extended(pools: Sequence[str], count: int) -> list[str]:
    return [pools[min(index, len(pools) - 1)] for index in range(count)]


def _said(
    before: Plan, now: Plan, survivors: dict[int, int], there: tuple[int, int], microbatches: int
) -> tuple[str, ...]:
    said = []
    for role, old, new, count in (
        ("attention", before.attention_ranks, now.attention_ranks, there[0]),
        ("expert", before.expert_ranks, now.expert_ranks, there[1]),
    ):
        if old != new:
            said.append(f"{new} {role} ranks in place of {old}")
        if new != count:
            why = f"into {now.groups} ZP groups" if role == "expert" else f"{microbatches} microbatches of a step"
            said.append(f"{count - new} {role} ranks stay idle: {count} do not divide {why}")
    if before.groups != now.groups:
        said.append(f"{now.groups} ZP groups in place of {before.groups}")
    moved = sum(survivors.get(old) != new for layers in zip(before.placement, now.placement)
                for old, new in zip(*layers))
    if moved:
        said.append(f"{moved} of {sum(map(len, now.placement))} experts of all layers move; the fullest rank holds "
                    f"{_fullest(now)} in place of {_fullest(before)}")
    if before.attention_ranks != now.attention_ranks:
        said.append(f"{microbatches // _replicas(now, now.attention_ranks)} microbatches of each attention rank in place "
                    f"of {microbatches // _replicas(before, before.attention_ranks)}")
    return tuple(said)


def _fullest(plan: Plan) -> int:
    """The most (layer, expert) pairs of a member."""
    holders = [holder for layer in plan.placement for holder in layer]
    return max(holders.count(holder) for holder in set(holders))
