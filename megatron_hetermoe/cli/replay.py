"""What ``hetermoe simulate --replay`` starts: a process for each member of a ZP group in each pipeline stage, whose tasks wait
out their price.

Every rank prices the plan by itself, from the same files, so nothing but paths goes through the command line.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import Plan, read_plan
from megatron_hetermoe.cost.cluster import Cluster, Kind, kinds_of, read_cluster
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.schedule.orders import Schedule
from megatron_hetermoe.simulator.events import simulate_stages
from megatron_hetermoe.simulator.planned import priced_stages
from megatron_hetermoe.simulator.summary import summarise
from megatron_hetermoe.topology.layout import layout_of
from megatron_hetermoe.topology.placement import even_placement

MOST_MEMBERS = 16  # of a ZP group that is replayed; each is a process
_RESULT = "seconds.json"


Stages = list[tuple[Schedule, TaskCosts]]  # of one ZP group in each


def ways(plan: Plan, cluster: Cluster, kinds: Mapping[str, Kind]) -> dict[str, Stages]:
    """The plan, and what it is to be compared with: no expert on attention ranks, and no two microbatches at a time."""
    even = replace(plan, placement=even_placement(plan.model, layout_of(plan)).holders)
    found = {
        "the plan": plan,
        "experts spread over expert ranks": even,
        "that, one microbatch at a time": replace(even, schedule="sequential", wave=None),
    }
    return {name: priced_stages(way, cluster, kinds) for name, way in found.items()}


def replayed(
    plan_path: str, cluster_path: str, found: Mapping[str, Stages], scale: float
) -> dict[str, tuple[float, float]]:
    """Runs every way here, one after the other.

    Args:
        plan_path, cluster_path: the files that ``found`` was made of.
        found: from ``ways``.
        scale: that prices are multiplied by; tasks of 20 ms and more are waited out with little error.

    Returns:
        Seconds of a step's tasks, as simulated and as they were, by name.

    Raises:
        UsageError: when a ZP group has more members than processes can be started for.
    """
    from megatron_hetermoe.cli.interrupt import interruptible
    from megatron_hetermoe.cli.launch import Ranks

    stages = next(iter(found.values()))
    members = len(stages) * stages[0][1].group.members
    if members > MOST_MEMBERS:
        raise UsageError([f"a ZP group of the plan has {members} members, and --replay starts a process for each: at most "
                          f"{MOST_MEMBERS}; plan for fewer GPUs"])
    with tempfile.TemporaryDirectory() as folder:
        argv = [plan_path, cluster_path, str(scale), str(Path(folder, _RESULT))]
        with interruptible(), Ranks(members, argv, {}, Path(folder), entry=__name__, fork=False) as ranks:
            while ranks.wait(0.5):
                pass
        if ranks.failed is not None:
            raise RuntimeError(f"rank {ranks.failed} failed:\n" + ranks.log(ranks.failed).read_text(errors="replace"))
        measured = json.loads(Path(folder, _RESULT).read_text())
    return {
        name: (scale * _tasks_seconds(way), seconds) for (name, way), seconds in zip(found.items(), measured)
    }


def _tasks_seconds(stages: Stages) -> float:
    """Of a simulated step until its last task ends: gradients are not replayed, nor what queueing would take hosts."""
    results = simulate_stages([(schedule, costs.without_hosts) for schedule, costs in stages])
    return results[0].seconds - summarise(*results).after


def main(argv: Sequence[str]) -> int:
    """One rank."""
    import torch
    import torch.distributed as dist

    from megatron_hetermoe.runtime.replay import priced, replay

    plan_path, cluster_path, scale, result = argv
    plan, cluster = read_plan(plan_path), read_cluster(cluster_path)
    found = ways(plan, cluster, kinds_of(cluster, plan.model, plan.attention_precision, Notes()))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = torch.tensor(replay(rank, world, [priced(*way, scale=float(scale)) for way in found.values()]), dtype=torch.float64)
    dist.all_reduce(own, op=dist.ReduceOp.MAX)
    if rank == 0:
        Path(result).write_text(json.dumps(own.tolist()))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
