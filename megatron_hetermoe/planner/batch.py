"""A batch job: how many nodes of which pool it takes, and what tells its ranks apart."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.cost.cluster import Cluster, ClusterPool
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT, layout_of

_GPU_OPTIONS = {"gres", "gpus", "gpus-per-node", "gpus-per-task", "tres-per-node", "tres-per-task"}


@dataclass(frozen=True)
class Component:
    """Nodes of one kind in a job.

    Attributes:
        pool: what its ranks call their pool, as HETERMOE_POOL; empty where there is one component for all.
        nodes: how many.
        options: of sbatch, without their dashes; "" for one without a value.
    """

    pool: str
    nodes: int
    options: dict[str, str]


def components(cluster: Cluster, plan: Plan, problems: Problems) -> list[Component]:
    """A component for each pool that the plan has ranks on, in the order in which ranks are numbered.

    Args:
        cluster: where it runs.
        plan: with the pools of a planner, or without; then attention ranks go to the first pool of the cluster and
            expert ranks to the second, or both to the only one.
        problems: gets what does not fit.
    """
    pools = [pool for _, pool, _ in _ranks_of(cluster, plan, Problems())]
    for first, second in itertools.combinations(pools, 2):
        if first.slurm == second.slurm:
            problems.add(f"{cluster.origin}: nothing tells Slurm which nodes are of pool {first.name} and which of "
                         f"{second.name}: give each its own, as slurm: {{partition: {first.name}}} or a constraint")
    return _components(cluster, plan, problems)


def elastic_components(cluster: Cluster, plan: Plan, problems: Problems) -> tuple[list[Component], list[int]]:
    """As ``components``, for a job that also starts with fewer nodes, down to one of each pool.

    Nodes are asked for by the CPUs of their ranks: with --ntasks-per-node beside a range of nodes Slurm (22.05) gives the
    fewest, without it the most that are free.

    Returns:
        The components, and for each the most ranks that a node takes.
    """
    parts = components(cluster, plan, problems)
    if problems:
        return [], []
    pools = [pool for _, pool, _ in _ranks_of(cluster, plan, Problems())]
    roles = (plan.attention_ranks, plan.expert_ranks)
    if len(parts) != 2 or tuple(ranks for _, _, ranks in _ranks_of(cluster, plan, Problems())) != roles:
        problems.add(f"an elastic job has one pool of attention and one of expert ranks; this plan uses "
                     f"{', '.join(pool.name for pool in pools)}: leave --elastic out")
        return [], []
    each = [min(ranks, pool.gpus_per_node) for ranks, pool in zip(roles, pools)]
    result = []
    for part, ranks in zip(parts, each):
        cpus = part.options.get("cpus-per-task", "1")
        if not cpus.isdecimal():
            problems.add(f"{cluster.origin}: cpus-per-task is {cpus!r}; it must be a whole number")
            continue
        options = {name: value for name, value in part.options.items() if name not in ("ntasks", "ntasks-per-node")}
        nodes = f"1-{part.nodes}" if part.nodes > 1 else "1"
        result.append(Component(part.pool, part.nodes, {"mincpus": str(ranks * int(cpus)), **options, "nodes": nodes}))
    return result, each


def _components(cluster: Cluster, plan: Plan, problems: Problems) -> list[Component]:
    result = []
    for name, pool, ranks in _ranks_of(cluster, plan, problems):
        if ranks > pool.gpus:
            problems.add(f"{cluster.origin}: {ranks} ranks on pool {pool.name}, which has {pool.gpus} GPUs: take fewer, "
                         "or make a plan for this cluster")
            continue
        nodes = -(-ranks // pool.gpus_per_node)
        tasks = {"nodes": str(nodes)}
        if ranks % pool.gpus_per_node and nodes > 1:
            tasks["ntasks"] = str(ranks)
        else:
            tasks["ntasks-per-node"] = str(ranks // nodes)
        if not _GPU_OPTIONS & pool.slurm.keys():
            tasks["gpus-per-node"] = str(min(ranks, pool.gpus_per_node))
        result.append(Component(name, nodes, {**pool.slurm, **tasks}))
    return result


def one_component(cluster: Cluster, plan: Plan, problems: Problems) -> tuple[Component, str]:
    """One component over nodes of all pools, which share a partition, and the patterns (HETERMOE_POOLS) that tell them
    apart: a pool's ``constraint`` where it has one, otherwise its kind of GPU.

    The arguments are those of ``components``.
    """
    parts = _components(cluster, plan, problems)
    pools = {name: pool for name, pool, _ in _ranks_of(cluster, plan, Problems())}
    if problems or len(parts) < 2:
        return (parts or [Component("", 0, {})])[0], ""
    shared = [{key: value for key, value in part.options.items() if key not in ("nodes", "constraint")} for part in parts]
    differing = sorted({key for options in shared for key in options if len({one.get(key) for one in shared}) > 1})
    if differing:
        problems.add(f"{cluster.origin}: pools differ in {', '.join(differing)}, so one component cannot hold them: "
                     "leave --mixed out")
    if any("ntasks" in part.options for part in parts):
        problems.add("with --mixed every node has as many ranks as GPUs, and here the last node of a pool has fewer: "
                     "leave --mixed out, or change the number of ranks")
    features = [pool.slurm.get("constraint", "") for pool in pools.values()]
    if any(features) and not all(feature.replace("_", "").isalnum() for feature in features):
        problems.add(f"{cluster.origin}: with --mixed the constraint of each pool must be one feature, and is "
                     f"{', '.join(map(repr, features))}")
    terms = {name: pool.slurm.get("constraint") or gpu_word(pool) for name, pool in pools.items()}
    if len(set(terms.values())) < len(terms):
        problems.add(f"{cluster.origin}: nothing tells nodes of {' and '.join(terms)} apart: give each a constraint")
    options = {**shared[0], "nodes": str(sum(part.nodes for part in parts))}
    if all(features):
        options["constraint"] = "[" + "&".join(f"{feature}*{part.nodes}" for feature, part in zip(features, parts)) + "]"
    patterns = " ".join(f"{name}={term}" for name, term in terms.items())
    return Component("", int(options["nodes"]), options), patterns


def gpu_word(pool: ClusterPool) -> str:
    """The word of a GPU's name that tells its kind, of a row of the device table as ``V100-SXM2``."""
    return pool.kind.partition("-")[0]


def _ranks_of(cluster: Cluster, plan: Plan, problems: Problems) -> list[tuple[str, ClusterPool, int]]:
    """(what its ranks call it, pool, ranks) for each pool with ranks."""
    if plan.pools:
        layout = layout_of(plan)
        counts: Mapping[str, int] = Counter(plan.pools[layout.member_of(rank)] for rank in range(layout.world_size))
        for name in counts.keys() - cluster.pools.keys():
            problems.add(f"the plan has ranks on pool {name}, and {cluster.origin} has {', '.join(cluster.pools)}: name "
                         "the cluster that the plan was made for")
        return [(name, cluster.pools[name], ranks) for name, ranks in counts.items() if name in cluster.pools]
    pools = list(cluster.pools.values())
    if len(pools) == 1:
        return [("", pools[0], plan.attention_ranks + plan.expert_ranks)]
    if len(pools) > 2:
        problems.add(f"{cluster.origin} has {len(pools)} pools, and no plan says who uses which: make one with "
                     "`hetermoe plan`, and give it with `-- --hetermoe-plan plan.json`")
        return []
    return [(ATTENTION, pools[0], plan.attention_ranks), (EXPERT, pools[1], plan.expert_ranks)]
