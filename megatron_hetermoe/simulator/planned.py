"""The simulated step of a plan, on the cluster that it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import MOST
from megatron_hetermoe.config.plan import PRECISIONS, SCHEDULES, Plan
from megatron_hetermoe.config.step import RECOMPUTE
from megatron_hetermoe.cost.cluster import Cluster, kinds_of
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.tasks import TaskCosts, costs_of_plan
from megatron_hetermoe.schedule.orders import build
from megatron_hetermoe.schedule.trace import Span
from megatron_hetermoe.simulator.events import Result, simulate
from megatron_hetermoe.topology.layout import Layout, layout_of, layout_problems

_MAY_BE_ZERO = ("dense_ffn", "shared_expert_ffn", "mtp_layers")  # what a model may not have


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
    schedule = build(
        plan.schedule, plan.model.layers, costs.placement, layout.m, plan.step.microbatches, plan.wave,
        delayed=plan.delayed,
    )
    return Predicted(simulate(schedule, costs), costs, layout)


def _check(plan: Plan, cluster: Cluster, origin: str) -> None:
    """What must hold before a plan can be priced."""
    problems = Problems()
    if plan.step is None or not plan.pools:
        problems.add(f"{origin} says no step and no pools: make it with `hetermoe plan --cluster`, or there is nothing "
                     f"to price")
    if max(plan.context_parallel, plan.expert_tensor_parallel) > 1:
        problems.add(f"{origin} has context parallelism, or experts shared by ranks, which nothing prices yet: simulate a "
                     f"plan without that")
    if plan.stages > 1:
        problems.add(f"{origin} has {plan.stages} pipeline stages, which nothing prices yet: simulate a plan with one")
    for name in sorted(set(plan.pools) - cluster.pools.keys()):
        problems.add(f"{origin} uses the pool {name}, {cluster.origin} has {', '.join(cluster.pools)}: give the "
                     f"cluster file that it was made for")
    for problem in layout_problems(
        plan.attention_ranks, plan.expert_ranks, max(1, plan.groups), plan.tensor_parallel
    ):
        problems.add(f"{origin}: {problem}")
    figures = _figures(plan)
    for problem in figures:
        problems.add(f"{origin}: {problem}: make it anew")
    if figures or not plan.pools:
        problems.raise_if_any()  # what follows counts with them
    members = (plan.attention_ranks + plan.expert_ranks) // plan.groups
    if len(plan.pools) != members:
        problems.add(f"{origin} names pools for {len(plan.pools)} members, a ZP group of it has {members}: make it "
                     f"anew")
    experts = [plan.model.experts if layer in plan.model.moe_layers else 0
               for layer in range(1, plan.model.layers + 1)]
    if [len(layer) for layer in plan.placement] != experts \
            or any(not 0 <= holder < members for layer in plan.placement for holder in layer):
        problems.add(f"{origin}: the placement does not fit the model or the layout: make it anew")
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
    if len(plan.placement) != model.layers or not set(model.moe_layers) <= set(range(1, len(plan.placement) + 1)) \
            or not model.moe_layers or model.decoder_layers < 1:
        found.append(f"it has {model.layers} layers, some of them with experts, and a placement for {len(plan.placement)}")
    return found
