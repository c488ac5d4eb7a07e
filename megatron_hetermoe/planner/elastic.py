"""The plan nearest to an earlier one for the ranks that are there now: some were lost, or some came.

What a checkpoint holds does not depend on the layout, so any will do; the nearest keeps what was tuned (pipeline stages, ZP
groups, wave, how experts are shared between roles and kinds of GPU) and moves few experts.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.stages import stage_flags
from megatron_hetermoe.cost.cluster import Cluster, Kind
from megatron_hetermoe.cost.tasks import costs_of_plan
from megatron_hetermoe.planner.memory import in_flight, member_memory, usable, waves_ahead
from megatron_hetermoe.topology.layout import Layout, layout_of, layout_problems
from megatron_hetermoe.topology.placement import Placement


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
    before = layout_of(plan)
    base = _merged(plan, _stages(plan, attention_ranks, expert_ranks))
    now = _layout(base, attention_ranks, expert_ranks, microbatches)
    # Holders of a ZP group: an attention rank is one, and as many expert ranks together as share their experts' weights.
    survivors = {i: i for i in range(min(before.m, now.m))}
    survivors |= {before.m + j: now.m + j for j in range(min(before.holders - before.m, now.holders - now.m))}
    placement = tuple(_placed(layer, survivors, before, now) for layer in plan.placement)
    step = plan.step and replace(plan.step, microbatches=microbatches // now.microbatches)
    pools = ()
    if plan.pools:
        attention, expert = plan.pools[:before.m], plan.pools[before.m:]
        pools = (*_extended(attention, now.m), *_extended(expert, now.n))
    changed = replace(base, attention_ranks=now.attention_ranks, expert_ranks=now.expert_ranks, groups=now.groups,
                      placement=placement, step=step, pools=pools)
    said = _said(plan, changed, survivors, (attention_ranks, expert_ranks), microbatches)
    return Refit(plan if changed == plan else replace(changed, predicted=None, tasks=()), said)


def _stages(plan: Plan, attention_ranks: int, expert_ranks: int) -> int:
    """Pipeline stages that the ranks are enough for: the plan's, or else the most of those that it divides into, so that
    stages next to each other become one."""
    shares = plan.tensor_parallel * plan.context_parallel, plan.expert_tensor_parallel
    most = min(attention_ranks // shares[0], expert_ranks // shares[1])
    return max((count for count in range(1, plan.stages + 1) if plan.stages % count == 0 and count <= most), default=1)


def _merged(plan: Plan, stages: int) -> Plan:
    """The plan with so many pipeline stages, each of as many next to each other as that leaves of the plan's. A placement
    stays one, since all ZP groups have the same members."""
    together = plan.stages // stages
    if together == 1:
        return plan
    if stages == 1:
        return replace(plan, stage_layers=(), virtual_stages=1)
    layers = plan.stage_layers
    return replace(plan, stage_layers=tuple(
        sum(layers[first:first + together]) for first in range(0, len(layers), together)))


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
    stages = [costs_of_plan(plan, cluster, kinds, stage) for stage in range(plan.stages)]

    def lacking(wave: int) -> dict[tuple[int, int], float]:
        """Bytes over what a plan may fill, by stage and member."""
        over = {}
        for stage, costs in enumerate(stages):
            group = costs.group
            there = in_flight(plan.schedule, wave, plan.step.microbatches, plan.model.layers,
                              waves_ahead(stage, plan.stages, plan.virtual_stages))
            for member in range(group.members):
                needed = member_memory(group, member, costs.placement.experts_held(member), there,
                                       weight_gradients=plan.weight_gradients).total
                over[stage, member] = needed - usable(group, member)
        return {place: size for place, size in over.items() if size > 0}

    before = plan.wave or plan.step.microbatches
    wave = next((wave for wave in range(before, 0, -1) if not lacking(wave)), None)
    if wave is None:
        (stage, member), size = max(lacking(1).items(), key=lambda item: item[1])
        costs = stages[stage]
        raise UsageError([f"the model does not fit the ranks that are left: with {costs.placement.experts_held(member)} "
                          f"experts of all layers a GPU of {costs.group.seats[member].pool.name} lacks {size / 1e9:.1f} GB; "
                          "more ranks are needed"])
    if wave == before:
        return found
    return Refit(replace(plan, wave=wave),
                 (*found.said, f"{wave} microbatches on the way together in place of {before}, for memory"))


def _layout(plan: Plan, attention_ranks: int, expert_ranks: int, microbatches: int) -> Layout:
    """The layout of the plan's stages with the most ranks, then the number of ZP groups nearest to the plan's."""
    stages, together = plan.stages, plan.expert_tensor_parallel
    parts = plan.tensor_parallel * plan.context_parallel  # attention ranks that share a microbatch
    most, holders = attention_ranks // (stages * parts), expert_ranks // (stages * together)
    best: tuple[tuple[int, int, int], Layout] | None = None
    for groups in range(1, min(most, holders) + 1):
        fitting = [copies for copies in range(groups, most + 1, groups) if microbatches % copies == 0]
        if not fitting:
            continue
        layout = Layout(max(fitting) * parts * stages, holders // groups * groups * together * stages, groups,
                        plan.tensor_parallel, together, plan.context_parallel, stages)
        key = (layout.world_size, -abs(groups - plan.groups), -groups)
        if best is None or key > best[0]:
            best = key, layout
    if best is None:
        least = "one of each role is" if (parts, together) == (1, 1) else \
            f"{parts} and {together} of them, which share weights or a sequence, are"
        raise UsageError([f"{attention_ranks} attention and {expert_ranks} expert ranks make no layout for "
                          f"{microbatches} microbatches a step: at least {least} needed"])
    return best[1]


def _placed(
    holders: Sequence[int], survivors: Mapping[int, int], before: Layout, now: Layout
) -> tuple[int, ...]:
    """One layer's holders among the new members; experts stay where they can.

    Args:
        holders: by expert, among the members before.
        survivors: from members before to those now.
        before, now: layouts.
    """
    counts = Counter(holders)
    held = [counts[member] for member in range(before.holders)]
    on_attention = min(len(holders), round(sum(held[:before.m]) * now.m / before.m))
    targets = []
    for total, start, size, count in (
        (on_attention, 0, before.m, now.m), (len(holders) - on_attention, before.m, before.holders - before.m, now.holders - now.m),
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
    if before.stages != now.stages:
        flags = shlex.join(stage_flags(now.stage_layers, now.virtual_stages, now.model.mtp_layers))
        said.append(f"{now.stages} pipeline stages in place of {before.stages}: start with {flags}")
    for role, old, new, count in (
        ("attention", before.attention_ranks, now.attention_ranks, there[0]),
        ("expert", before.expert_ranks, now.expert_ranks, there[1]),
    ):
        if old != new:
            said.append(f"{new} {role} ranks in place of {old}")
        if new != count:
            why = f"into {now.groups} ZP groups" if role == "expert" else f"{microbatches} microbatches of a step"
            why += f" in {now.stages} pipeline stages" if now.stages > 1 else ""
            said.append(f"{count - new} {role} ranks stay idle: {count} do not divide {why}")
    if before.groups != now.groups:
        said.append(f"{now.groups} ZP groups in place of {before.groups}")
    moved = sum(survivors.get(old) != new for layers in zip(before.placement, now.placement)
                for old, new in zip(*layers))
    if moved:
        said.append(f"{moved} of {sum(map(len, now.placement))} experts of all layers move; the fullest rank holds "
                    f"{_fullest(now)} in place of {_fullest(before)}")
    counts = [microbatches // layout_of(plan).microbatches for plan in (now, before)]
    if counts[0] != counts[1]:
        said.append(f"{counts[0]} microbatches of each attention rank in place of {counts[1]}")
    return tuple(said)


def _fullest(plan: Plan) -> int:
    """The most (layer, expert) pairs of a member, in whatever stage."""
    layout = layout_of(plan)
    placement = Placement(plan.placement, layout.holders)
    stages = [placement.of_chunks(plan.chunks_of_stage(stage)) for stage in range(plan.stages)]
    return max(stage.experts_held(holder) for stage in stages for holder in range(layout.holders))
