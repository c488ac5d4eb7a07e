"""The simulated step of a plan, on the cluster that it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.cost.cluster import Cluster, kinds_of
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.tasks import TaskCosts, costs_of_plan
from megatron_hetermoe.schedule.orders import build
from megatron_hetermoe.schedule.trace import Span
from megatron_hetermoe.simulator.events import Result, simulate
from megatron_hetermoe.topology.layout import Layout, layout_of, layout_problems


@dataclass(frozen=True)
class Predicted:
    """One step as it is predicted. One ZP group is simulated; the others do the same.

    Attributes:
        result: of the group.
        costs: that it was simulated with.
        layout: the plan's.
    """

    result: Result
    costs: TaskCosts
    layout: Layout

    @cached_property
    def spans(self) -> list[Span]:
        """The first ZP group's trace."""
        return self.result.spans(lambda member: self.layout.rank_of(0, member), self.costs)


def predict(plan: Plan, cluster: Cluster, origin: str, notes: Notes) -> Predicted:
    """Simulates a plan's step.

    Args:
        plan: made by the planner.
        cluster: that it was made for.
        origin: the plan's file, for messages.
        notes: gets what is to be said of the prices.

    Raises:
        UsageError: with all that keeps the plan from being priced.
    """
    _check(plan, cluster, origin)
    costs = costs_of_plan(plan, cluster, kinds_of(cluster, plan.model, plan.attention_precision, notes))
    layout = layout_of(plan)
    schedule = build(plan.schedule, plan.model.layers, costs.placement, layout.m, plan.step.microbatches, plan.wave)
    return Predicted(simulate(schedule, costs), costs, layout)


def _check(plan: Plan, cluster: Cluster, origin: str) -> None:
    """What must hold before a plan can be priced."""
    problems = Problems()
    if plan.step is None or not plan.pools:
        problems.add(f"{origin} says no step and no pools: make it with `hetermoe plan --cluster`, or there is nothing "
                     f"to price")
    if max(plan.tensor_parallel, plan.expert_tensor_parallel) > 1:
        problems.add(f"{origin} has tensor parallelism, which nothing prices yet: simulate a plan without it")
    for name in sorted(set(plan.pools) - cluster.pools.keys()):
        problems.add(f"{origin} uses the pool {name}, {cluster.origin} has {', '.join(cluster.pools)}: give the "
                     f"cluster file that it was made for")
    for problem in layout_problems(plan.attention_ranks, plan.expert_ranks, max(1, plan.groups)):
        problems.add(f"{origin}: {problem}")
    members = (plan.attention_ranks + plan.expert_ranks) // max(1, plan.groups)
    if plan.pools and len(plan.pools) != members:
        problems.add(f"{origin} names pools for {len(plan.pools)} members, a ZP group of it has {members}: make it "
                     f"anew")
    experts = [plan.model.experts if layer in plan.model.moe_layers else 0
               for layer in range(1, plan.model.layers + 1)]
    if [len(layer) for layer in plan.placement] != experts \
            or any(not 0 <= holder < members for layer in plan.placement for holder in layer):
        problems.add(f"{origin}: the placement does not fit the model or the layout: make it anew")
    problems.raise_if_any()
