"""Pipelines: how layers are divided into stages, and the placement and the step of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from megatron_hetermoe.config.plan import TOGETHER, Plan
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.cost.group import GroupCosts
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.planner.asym_ea import (
    LONG, Assignment, Limits, balance, by_memory, counts_of, feasible, long_step_seconds, placement_of,
)
from megatron_hetermoe.schedule.interleaved import schedule_of
from megatron_hetermoe.simulator.baselines import spread
from megatron_hetermoe.simulator.events import simulate_stages

if TYPE_CHECKING:
    import numpy as np

MOST_STAGES = 16
_UNEVEN = 1.5  # times an even part, that the layers of a stage may be
_EVENTS = 16 * LONG  # layers x microbatches that the event simulator takes a second or two for


def divisions(shape: ModelShape) -> tuple[tuple[int, ...], ...]:
    """The layers of each stage, for 2, 4, ... stages: as even as Megatron's flags can say, with another number in the last
    one where they do not divide. Each stage has a layer with experts; divisions that are far from even are left out, and so
    are models that predict further tokens."""
    found: list[tuple[int, ...]] = []
    if shape.mtp_layers:
        return ()
    stages = 2
    while stages <= min(MOST_STAGES, shape.layers):
        even = shape.layers / stages
        ways = [(*[others] * (stages - 1), shape.layers - others * (stages - 1)) for others in (math.ceil(even), int(even))]
        layers = min((way for way in ways if min(way) > 0), key=max)
        if max(layers) <= _UNEVEN * even and all(shape.of_layers(part).moe_layers for part in parts_of(layers)):
            found.append(layers)
        stages *= 2
    return tuple(found)


def parts_of(stage_layers: Sequence[int]) -> list[range]:
    """The layers, from 1 on, of each stage, or of each chunk where stages have several."""
    result, first = [], 1
    for count in stage_layers:
        result.append(range(first, first + count))
        first += count
    return result


def layers_of(stage_layers: Sequence[int], virtual_stages: int) -> tuple[tuple[int, ...], ...]:
    """The layers, from 1 on, of each pipeline stage that layers are divided into as in a plan."""
    parts = parts_of(stage_layers)
    stages = len(parts) // virtual_stages
    return tuple(tuple(chain(*parts[stage::stages])) for stage in range(stages))


def quick_seconds(stages: Sequence[GroupCosts], limits: Sequence[Limits], wave: int) -> float | None:
    """A first figure for a pipeline's step: experts on expert ranks, or where there is room; None where there is none."""
    each = []
    for group, limit in _distinct(stages, limits).values():
        group = replace(group, chunks=())
        experts = counts_of(spread(group, range(group.attention_members, group.members)))[0].astype(int)
        if not feasible(experts, limit):
            experts = by_memory(group, limit)
            if experts is None:
                return None
        each.append(float(long_step_seconds(group, experts[None].astype(float), wave)[0]))
    by_key = dict(zip(_distinct(stages, limits), each))
    return _step([(group, by_key[_key(group, limit)]) for group, limit in zip(stages, limits)], wave)


def balance_stages(
    stages: Sequence[GroupCosts], limits: Sequence[Limits], wave: int, thorough: bool
) -> Assignment | None:
    """The placement of a pipeline: that of each stage by itself, once for stages that are alike, and as if its chunks were one
    after the other.

    Args:
        stages: the ZP group's costs in each stage.
        limits: of each, with the waves that it has on the way.
        wave: R.
        thorough: whether neighbours of each stage's best are searched, and the event simulator judges.

    Returns:
        Experts of all layers; None when no assignment fits.
    """
    import numpy as np

    found: dict[tuple, Assignment] = {}
    for key, (group, limit) in _distinct(stages, limits).items():
        assignment = balance(replace(group, chunks=()), limit, wave, thorough)
        if assignment is None:
            return None
        found[key] = assignment
    chosen = [found[_key(group, limit)] for group, limit in zip(stages, limits)]
    experts = np.empty((sum(len(one.experts) for one in chosen), stages[0].members), chosen[0].experts.dtype)
    for layers, one in zip(layers_of(*division_of(stages)), chosen):
        experts[np.array(layers) - 1] = one.experts
    seconds = _step([(group, one.seconds) for group, one in zip(stages, chosen)], wave)
    if thorough:
        seconds = _by_events(stages, experts, wave) or seconds
    origins = {one.origin for one in chosen}
    return Assignment(experts, seconds, origins.pop() if len(origins) == 1 else "balance", None, None)


def _key(group: GroupCosts, limit: Limits) -> tuple:
    """What the placement of a stage depends on; room for more than all experts is as good as room for all."""
    most = group.shape.experts * len(group.shape.moe_layers)
    return group.begins, group.ends, group.shape, tuple(min(most, pairs) for pairs in limit.pairs)


def _distinct(stages: Sequence[GroupCosts], limits: Sequence[Limits]) -> dict[tuple, tuple[GroupCosts, Limits]]:
    return {_key(group, limit): (group, limit) for group, limit in zip(stages, limits)}


def _waves(group: GroupCosts, wave: int) -> int:
    return -(-group.step.microbatches // wave)


def _step(stages: Sequence[tuple[GroupCosts, float]], wave: int) -> float:
    """Seconds of a pipeline's step, from those of each stage by itself: the slowest stage's, and a wave of each other one,
    before its first wave comes and after its last one has gone; of one chunk of it where a stage has several. As many waves are
    on the way as there are stages, so what one waits in handovers, there and back, each waits by that share."""
    each, chunks = [], max(1, len(stages[0][0].chunks))
    for group, seconds in stages:
        once = max(group.optimizer(members[0], 0) for members in group.alike.values())
        each.append((seconds, (seconds - once) / _waves(group, wave) / chunks))
    slowest = max(range(len(each)), key=lambda stage: each[stage][0])
    handovers = 2 * (len(each) * chunks - 1) * stages[0][0].handover_seconds(0) * max(1.0, _waves(stages[0][0], wave) / len(each))
    return each[slowest][0] + sum(one for stage, (_, one) in enumerate(each) if stage != slowest) + handovers


def division_of(stages: Sequence[GroupCosts]) -> tuple[tuple[int, ...], int]:
    """How many layers each stage, or chunk, has and how many chunks a stage has, as in a plan."""
    chunks = [group.chunks or (group.shape,) for group in stages]
    return tuple(shape.layers for of_stages in zip(*chunks) for shape in of_stages), len(chunks[0])


def _by_events(stages: Sequence[GroupCosts], experts: np.ndarray, wave: int) -> float | None:
    """Seconds of the step by the event simulator. Once every stage has a wave, each further one takes as long as the one
    before, so no more are simulated than fill the stages twice; None where these are too many."""
    waves, full = _waves(stages[0], wave), 2 * len(stages)
    more = len(stages) if stages[0].chunks else 1  # chunks take turns after as many waves as there are stages
    if waves <= full + more:
        return _simulated(stages, experts, wave, stages[0].step.microbatches)
    shorter, longer = (_simulated(stages, experts, wave, count * wave) for count in (full, full + more))
    if shorter is None or longer is None:
        return None
    # Waves are as equal as can be, so they are a little smaller than R where it does not divide the microbatches.
    return longer + (longer - shorter) / more * (stages[0].step.microbatches / wave - full - more)


def _simulated(stages: Sequence[GroupCosts], experts: np.ndarray, wave: int, microbatches: int) -> float | None:
    layers = [group.shape.layers for group in stages]
    if sum(layers) * microbatches > _EVENTS:
        return None
    results = simulate_stages(scheduled(stages, experts, wave, microbatches))
    return results[0].seconds


def scheduled(
    stages: Sequence[GroupCosts], experts: np.ndarray, wave: int, microbatches: int, weight_gradients: str = TOGETHER
) -> list:
    """For each stage the executor's schedule, and its costs.

    Args:
        stages: the ZP group's costs in each.
        experts: [K, members] of all layers.
        wave: R.
        microbatches: of the step that is scheduled.
        weight_gradients: of the plan.
    """
    layers, virtual = division_of(stages)
    placement, m = placement_of(experts), stages[0].attention_members
    whole = replace(stages[0].shape, layers=sum(layers), moe_layers=tuple(
        layer for layer, holders in enumerate(placement.holders, start=1) if holders))
    plan = Plan(whole, m * len(stages), (placement.members - m) * len(stages), 1, placement.holders, wave=wave,
                weight_gradients=weight_gradients, stage_layers=layers, virtual_stages=virtual)
    return [
        (schedule_of(plan, placement, m, stage, microbatches),
         TaskCosts(group, placement.of_chunks(plan.chunks_of_stage(stage)), weight_gradients))
        for stage, group in enumerate(stages)
    ]
