"""What the planner makes of the lab: profiles taken there, the placement that it chooses, and what it predicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import bound
import yaml
from lab import Ended
from measure import Machine
from systems import ASYM_EA, EVERYTHING, FAST, KERNELS, OWN_LAYOUT, PIPELINE, SLOW, equal_stages
from throttle import longer

from megatron_hetermoe.config.plan import MERGED, TOGETHER, Plan
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.cost.cluster import Cluster, Kind, kinds_of, read_cluster
from megatron_hetermoe.cost.curves import Curve, Notes
from megatron_hetermoe.cost.group import GroupCosts
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.planner.asym_ea import balance, counts_of
from megatron_hetermoe.planner.options import Option, Question, options
from megatron_hetermoe.planner.search import Priced, search
from megatron_hetermoe.simulator.baselines import (
    Pipeline, expert_parallel_tokens_per_second, pipelines, spread, zebra_seconds,
)

_LINK = {"gb_per_s": 100, "latency_us": 20}  # for reductions; the channel is measured


@dataclass(frozen=True)
class Prices:
    """For one model at one length.

    Attributes:
        predicted: seconds of a step, by system.
        plans: by system, for those that have one.
        split: the stages of a pipeline; None where stock Megatron could not run one.
        compute: by system, for disaggregated ones, the seconds that a rank of each role computes in a step.
        bound: seconds of a step if everything but compute were free.
        ep_compute: the same of expert parallelism on all ranks.
        longer: seconds a byte that throttled traffic takes longer; 0 where it is not throttled.
    """

    predicted: dict[str, float]
    plans: dict[str, Plan]
    split: Pipeline | None
    compute: dict[str, dict[str, float]]
    bound: float
    ep_compute: float
    longer: float


def take_profiles(
    folder: Path, model_flags: dict[str, object], machine: Machine, pools: Sequence[str], lengths: Sequence[int],
    memory: Mapping[str, float], limit: float, flags: Sequence[str] = (),
) -> Path:
    """Profiles every rank while all run, and the channel between the pools; returns the cluster file.

    Args:
        folder: for the files; what is there is not measured again.
        model_flags: Megatron's, as in a recipe.
        machine: where ranks run.
        pools: of all ranks, the fast one first.
        lengths: of sequences.
        memory: bytes of a rank of each pool.
        limit: seconds for each of the two measurements.
        flags: ours, beyond the kernel of attention.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe, cluster, measured = folder / "recipe.yaml", folder / "cluster.yaml", measured_in(folder)
    if measured.exists():
        return measured
    recipe.write_text(yaml.safe_dump({"MODEL_ARGS": model_flags}))
    outs = [folder / f"{pool}.{index}.json" for index, pool in enumerate(pools)]
    if not all(out.exists() for out in outs):
        _succeed(machine.run(pools, lambda index: [
            Path(__file__).with_name("fused.py"), "profile", recipe, "--out", outs[index], "--kind", pools[index],
            "--lengths", *lengths, "--", "--hetermoe", "--hetermoe-attention", KERNELS[pools[index]], *flags], limit))
    cluster.write_text(yaml.safe_dump({"pools": {
        pool: {"kind": outs[pools.index(pool)].name, "nodes": 1, "gpus_per_node": pools.count(pool), "intra_node": _LINK,
               "inter_node": _LINK, "memory_gb": memory[pool] / 1e9}
        for pool in dict.fromkeys(pools)
    }}, sort_keys=False))
    _succeed(machine.run(pools, lambda index: [
        "-m", "megatron_hetermoe", "profile", "--network", "--cluster", cluster, "--out", measured], limit, 1))
    return measured


def measured_in(folder: Path) -> Path:
    """The cluster file of profiles that are complete once it is there."""
    return folder / "measured.yaml"


def _succeed(ended: Ended) -> None:
    if ended.failure:
        raise SystemExit(json.dumps(ended.failure))


def price(
    path: Path, shape: ModelShape, batch: int, vocabulary: int, precision: str = "bf16", gbps: float | None = None,
    micro_batch: int = 1, cuda_graphs: bool = True,
) -> Prices:
    """Plans and predictions for a cluster that was measured.

    Args:
        path: of the cluster file.
        shape: the model's.
        batch: sequences of a step.
        vocabulary: rows of the output layer.
        precision: of parameters and activations.
        gbps: of a slower network that a rank's traffic is to be as on, in 10^9 bits a second; None for the measured one.
        micro_batch: sequences of a microbatch.
        cuda_graphs: whether attention ranks will have them, which take memory.
    """
    notes = Notes()
    cluster, more = throttled(read_cluster(path, notes), gbps, notes) if gbps else (read_cluster(path, notes), 0.0)
    kinds = kinds_of(cluster, shape, precision, notes)
    question = Question(shape, precision, micro_batch, batch, vocabulary, ("none",), (False,), weight_gradients=(TOGETHER, MERGED),
                        cuda_graphs=cuda_graphs)
    by_kind = _by_kind(question, cluster, kinds)
    found = {
        ASYM_EA: _priced(by_kind, "zebra", by_kind.wave), EVERYTHING: _priced(by_kind, "overlapped", _half(by_kind)),
        OWN_LAYOUT: next(iter(search(question, cluster, kinds).best), None),
    }
    chosen = {name: priced for name, priced in found.items() if priced is not None}
    group, tokens = by_kind.group, batch * shape.sequence
    merged = group.amortised(group.step.microbatches)
    even = spread(group, range(group.attention_members, group.members))
    pools = [[seat for seat in group.seats if seat.pool.name == name] for name in (FAST, SLOW)]
    split = equal_stages(pipelines(group), batch // micro_batch)
    predicted = {
        "EP, all ranks": tokens / expert_parallel_tokens_per_second(group, group.seats),
        "EP, fast pool alone": tokens / expert_parallel_tokens_per_second(group, pools[0]),
        "EP, slow pool alone": tokens / expert_parallel_tokens_per_second(group, pools[1]),
        "naive disaggregation": zebra_seconds(group, even, "sequential"),
        "zebra": zebra_seconds(group, even, weight_gradients=MERGED),
        **({PIPELINE: split.seconds + _after(group, split)} if split else {}),
        **{name: priced.assignment.seconds for name, priced in chosen.items()},
    }
    spread_out = counts_of(even)[0]
    compute = {
        "naive disaggregation": bound.by_role(group, spread_out), "zebra": bound.by_role(merged, spread_out),
        **{name: _compute(priced) for name, priced in chosen.items()},
    }
    return Prices(predicted, {name: priced.plan() for name, priced in chosen.items()}, split, compute,
                  bound.disaggregated(merged), bound.expert_parallel(group, batch), more)


def throttled(cluster: Cluster, gbps: float, notes: Notes) -> tuple[Cluster, float]:
    """A cluster whose channel is as slow as that, and the seconds that each byte takes longer."""
    channel = next(iter(cluster.pools.values())).channel
    points = {size: channel(size) for size in channel.sizes}
    more = longer(points, gbps)
    slow = Curve("throttled channel", "bytes", {size: seconds + more * size for size, seconds in points.items()}, notes)
    pools = {name: replace(pool, channel=slow) for name, pool in cluster.pools.items()}
    return replace(cluster, pools=pools), more


def _after(group: GroupCosts, split: Pipeline) -> float:
    """Seconds of gradient reduction and optimizer of the stage where they take longest."""
    seats = [next(seat for seat in group.seats if seat.pool.name == name)
             for name, count in zip((FAST, SLOW), split.stages) for _ in range(count)]
    longest = 0.0
    for stage, seat, ranks in zip(group.of_stages(split.layers), seats, split.ranks):
        stage = replace(stage, seats=(seat,) * ranks, attention_members=ranks, groups=1)
        costs = TaskCosts(stage, spread(stage, range(ranks)))
        longest = max(longest, costs.reduction(0) + costs.optimizer(0))
    return longest


def _compute(priced: Priced) -> dict[str, float]:
    group = priced.option.group
    if priced.weight_gradients == MERGED:
        group = group.amortised(priced.wave)
    return bound.by_role(group, priced.assignment.experts)


def _by_kind(question: Question, cluster: Cluster, kinds: dict[str, Kind]) -> Option:
    """The layout of the paper: attention on all of the fast pool, experts on all of the slow one."""
    wanted = tuple((name, cluster.pools[name].gpus) for name in (FAST, SLOW))
    return next(option for option in options(question, cluster, kinds)
                if (*option.attention, *option.expert) == wanted and option.groups == 1)


def _priced(option: Option, schedule: str, wave: int) -> Priced | None:
    """With so many microbatches on the way, 0 where none fit, and the placement that is fastest then; None if nothing fits."""
    limits = option.limits(wave, schedule, MERGED)[0]
    assignment = balance(option.group, limits, wave, schedule=schedule, weight_gradients=MERGED) if wave else None
    return assignment and Priced(option, wave, assignment, option.tokens / assignment.seconds, MERGED, schedule)


def _half(option: Option) -> int:
    """A step's microbatches in two waves, or in more where these do not fit; 0 for a step of one."""
    total = option.group.step.microbatches
    return min(option.wave, -(-total // 2)) if total > 1 else 0
