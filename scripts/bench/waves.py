"""How long a plan's step is with smaller waves, one after the other and overlapped, and what memory each takes.

    python scripts/bench/waves.py PLAN.json --cluster CLUSTER.yaml

Every row is simulated with the plan's placement, which was chosen for its own wave; ``of one wave`` says how much of the
speed of one wave with all microbatches, which needs most memory, is left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_hetermoe.config.plan import plan_from_json
from megatron_hetermoe.cost.cluster import kinds_of, read_cluster
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.tasks import TaskCosts, costs_of_plan
from megatron_hetermoe.planner.asym_ea import LONG, counts_of, long_step_seconds
from megatron_hetermoe.planner.memory import in_flight, member_memory
from megatron_hetermoe.schedule.orders import build
from megatron_hetermoe.simulator.events import simulate


def seconds(costs: TaskCosts, schedule: str, wave: int) -> float:
    """Of a step."""
    group = costs.group
    if group.shape.layers * group.step.microbatches > LONG:
        return float(long_step_seconds(group, counts_of(costs.placement), wave, schedule)[0])
    orders = build(schedule, group.shape.layers, costs.placement, group.attention_members, group.step.microbatches, wave,
                   weight_gradients=costs.weight_gradients)
    return simulate(orders, costs).seconds


def fullest(costs: TaskCosts, schedule: str, wave: int) -> tuple[float, float]:
    """Bytes of the fullest attention and expert rank."""
    group = costs.group
    there = in_flight(schedule, wave, group.step.microbatches, group.shape.layers)
    of = [member_memory(group, member, costs.placement.experts_held(member), there,
                        weight_gradients=costs.weight_gradients).total
          for member in range(group.members)]
    return max(of[:group.attention_members]), max(of[group.attention_members:])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan")
    parser.add_argument("--cluster", required=True)
    parsed = parser.parse_args()
    plan, cluster = plan_from_json(Path(parsed.plan).read_text(encoding="utf-8"), parsed.plan), read_cluster(parsed.cluster)
    costs = costs_of_plan(plan, cluster, kinds_of(cluster, plan.model, plan.attention_precision, Notes()))
    total = plan.step.microbatches
    best = seconds(costs, "zebra", total)
    table = Table("wave", "schedule", "step, s", "of one wave", "attention rank, GB", "expert rank, GB")
    for wave in sorted({-(-total // count) for count in range(1, total + 1)}):
        for schedule in ("zebra", "overlapped") if wave < total else ("zebra",):
            took = seconds(costs, schedule, wave)
            table.add_row(str(wave), schedule, f"{took:.3f}", f"{best / took:.0%}",
                          *(f"{size / 1e9:.1f}" for size in fullest(costs, schedule, wave)))
    Console().print(table)


if __name__ == "__main__":
    main()
