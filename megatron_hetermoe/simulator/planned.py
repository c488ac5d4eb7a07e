"""The simulated step of a plan, on the cluster that it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import MOST
from megatron_hetermoe.config.plan import PRECISIONS, SCHEDULES, Plan
from megatron_hetermoe.config.step import RECOMPUTE
from megatron_hetermoe.cost.cluster import Cluster, Kind, kinds_of
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.tasks import TaskCosts, costs_of_plan
from megatron_hetermoe.schedule.interleaved import schedule_of
from megatron_hetermoe.schedule.numbering import Numbering
from megatron_hetermoe.schedule.orders import Schedule
from megatron_hetermoe.schedule.trace import Span
from megatron_hetermoe.simulator.events import Result, simulate_stages
from megatron_hetermoe.topology.layout import Layout, layout_of, layout_problems, stage_problems
from megatron_hetermoe.topology.placement import Placement

# Of what a model may not have.
_MAY_BE_ZERO = ("dense_ffn", "shared_expert_ffn", "kv_lora_rank", "q_lora_rank", "qk_head_dim", "qk_position_dim", "v_head_dim",
                "mtp_layers")


@dataclass(frozen=True)
class Predicted:
    """One step as it is predicted. One ZP group of each pipeline stage is simulated; the others do the same.

    Attributes:
        results: of each stage's first group; members are ranks, those that are a holder together do the same.
        costs: of each stage, that it was simulated with; members are holders.
        plan: whose step it is.
    """

    results: tuple[Result, ...]
    costs: tuple[TaskCosts, ...]
    plan: Plan

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.plan)

    @cached_property
    def spans(self) -> list[Span]:
        """The first ZP groups' trace, in which layers have the model's numbers."""
        return [span for stage in range(self.layout.stages) for span in self._spans_of(stage)]

    def _spans_of(self, stage: int) -> list[Span]:
        group, numbering = self.groups[stage], Numbering(self.plan.chunks_of_stage(stage))
        return self.results[stage].spans(
            lambda member: self.layout.rank_of(group, member), self.costs[stage], self._holder, numbering.in_model)

    @property
    def groups(self) -> range:
        """The first ZP group of each stage."""
        return range(0, self.layout.stages * self.layout.groups, self.layout.groups)

    @property
    def ranks(self) -> list[int]:
        """Of these groups."""
        return sorted(rank for group in self.groups for rank in self.layout.zp_group(group))

    def _holder(self, member: int) -> int:
        return self.layout.holder_of(self.layout.rank_of(0, member))


def predict(
    plan: Plan, cluster: Cluster, origin: str, notes: Notes, kinds: Mapping[str, Kind] | None = None
) -> Predicted:
    """Simulates a plan's step.

    Args:
        plan: made by the planner.
        cluster: that it was made for.
        origin: the plan's file, for messages.
        notes: gets what is to be said of the prices.
        kinds: what its GPUs cost, in place of the files that the cluster names.

    Raises:
        UsageError: with all that keeps the plan from being priced.
    """
    _check(plan, cluster, origin)
    layout = layout_of(plan)
    kinds = kinds or kinds_of(cluster, plan.model, plan.attention_precision, notes)
    stages = priced_stages(plan, cluster, kinds)
    holders = [layout.holder_of(rank) for rank in layout.zp_group(0)]
    results = tuple(replace(result, members=tuple(result.members[holder] for holder in holders))
                    for result in simulate_stages(stages))
    return Predicted(results, tuple(costs for _, costs in stages), plan)


def priced_stages(plan: Plan, cluster: Cluster, kinds: Mapping[str, Kind]) -> list[tuple[Schedule, TaskCosts]]:
    """The schedule of each pipeline stage's ZP group, the executor's own, and its costs."""
    layout = layout_of(plan)
    placement = Placement(plan.placement, layout.holders)
    return [
        (schedule_of(plan, placement, layout.m, stage, plan.step.microbatches), costs_of_plan(plan, cluster, kinds, stage))
        for stage in range(plan.stages)
    ]


def _check(plan: Plan, cluster: Cluster, origin: str) -> None:
    """What must hold before a plan can be priced."""
    problems = Problems()
    if plan.step is None or not plan.pools:
        problems.add(f"{origin} says no step and no pools: make it with `hetermoe plan --cluster`, or there is nothing "
                     f"to price")
    for name in sorted(set(plan.pools) - cluster.pools.keys()):
        problems.add(f"{origin} uses the pool {name}, {cluster.origin} has {', '.join(cluster.pools)}: give the "
                     f"cluster file that it was made for")
    wrong = layout_problems(
        plan.attention_ranks, plan.expert_ranks, max(1, plan.groups), plan.tensor_parallel, plan.expert_tensor_parallel,
        plan.context_parallel, plan.stages,
    )
    for problem in wrong:
        problems.add(f"{origin}: {problem}")
    figures = _figures(plan)
    for problem in figures:
        problems.add(f"{origin}: {problem}: make it anew")
    if figures or wrong or not plan.pools:
        problems.raise_if_any()  # what follows counts with them
    layout = layout_of(plan)
    members = layout.m + layout.n
    if len(plan.pools) != members:
        problems.add(f"{origin} names pools for {len(plan.pools)} members, a ZP group of it has {members}: make it "
                     f"anew")
    experts = [plan.model.experts if layer in plan.model.moe_layers else 0
               for layer in range(1, plan.model.layers + 1)]
    if [len(layer) for layer in plan.placement] != experts \
            or any(not 0 <= holder < layout.holders for layer in plan.placement for holder in layer):
        problems.add(f"{origin}: the placement does not fit the model or the layout: make it anew")
    for problem in stage_problems(plan):
        problems.add(f"{origin}: {problem}")
    problems.raise_if_any()


def _figures(plan: Plan) -> list[str]:
    """What of a plan nothing could be priced with, one phrase each."""
    model, step = plan.model, plan.step
    counted = {f"the model's {name}": value for name, value in vars(model).items() if name not in _MAY_BE_ZERO}
    if step is not None:
        counted |= {f"the step's {name}": value for name, value in vars(step).items()}
    counted |= {"wave": plan.wave or 1, "groups": plan.groups}
    found = [f"{name} is {value}, not from 1 to {MOST}" for name, value in counted.items()
             if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= MOST]
    found += [f"the model's {name} is {getattr(model, name)}, not from 0 to {MOST}" for name in _MAY_BE_ZERO
              if not 0 <= getattr(model, name) <= MOST]
    choices = [("schedule", plan.schedule, SCHEDULES), ("attention_precision", plan.attention_precision, PRECISIONS)]
    choices += [("recompute", step.recompute, RECOMPUTE)] if step is not None else []
    found += [f"{name} is {value!r}, none of {', '.join(known)}" for name, value, known in choices if value not in known]
    if plan.virtual_stages < 1 or len(plan.stage_layers) % plan.virtual_stages or plan.virtual_stages > 1 and plan.stages < 2:
        found.append(f"virtual_stages is {plan.virtual_stages}, and stage_layers has {len(plan.stage_layers)} parts: so many of each "
                     "of several stages")
    if len(plan.placement) != model.layers or not set(model.moe_layers) <= set(range(1, len(plan.placement) + 1)) \
            or not model.moe_layers or model.decoder_layers < 1:
        found.append(f"it has {model.layers} layers, some of them with experts, and a placement for {len(plan.placement)}")
    return found
