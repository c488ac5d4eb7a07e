#!/usr/bin/env python3
"""On how many random inputs the planner's placement beats the paper's gather-and-squeeze, and by how much.

Each input has random pools, layers, experts, times and network, and no memory bound; both placements are judged by the
event simulator. Also prints how many steps a minute the simulators do.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import numpy as np

from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.config.step import Step
from megatron_hetermoe.cost.cluster import Cluster, ClusterPool, Link
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.profile import Profile, Profiled, taken_for
from megatron_hetermoe.cost.group import GroupCosts, seats_of
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.planner.asym_ea import Limits, balance, counts_of
from megatron_hetermoe.schedule.orders import zebra
from megatron_hetermoe.schedule.tasks import Kind, Stream
from megatron_hetermoe.simulator.baselines import spread
from megatron_hetermoe.simulator.events import simulate
from megatron_hetermoe.simulator.fast import step_seconds


def random_group(draw: random.Random) -> GroupCosts:
    """A ZP group whose expert ranks take between half and four times as long for a layer as attention ranks."""
    m, n = draw.randint(1, 6), draw.randint(1, 6)
    layers, experts = draw.randint(2, 12), draw.choice((8, 12, 14, 16, 24, 40))
    shape = ModelShape(layers, tuple(range(1, layers + 1)), experts, 2, 1024, 3584, 3584, 0, True, 16, 8, 64, False,
                       4096)
    attention = draw.uniform(1e-3, 1e-2)
    tokens = m * 4096 * 2 / experts
    unit = attention * draw.uniform(0.5, 4) * n / experts
    units = {"new": unit / draw.uniform(1, 4), "old": unit}
    pools, kinds = {}, {}
    for name, count in (("new", m), ("old", n)):
        parts = {"attention": {4096.0: (attention / 3, attention * 2 / 3)},
                 "expert": {tokens: (units[name] / 3, units[name] * 2 / 3)}}
        link = Link(draw.choice((3e9, 12e9, 50e9)) * count, 1e-5)
        pools[name] = ClusterPool(name, "", 1, count, 1e12, Link(100e9, 1e-5), link)
        kinds[name] = Profiled(Profile(name, taken_for(shape, "bf16"), parts), shape, "bf16", Notes())
    seats = seats_of(["new"] * m + ["old"] * n, Cluster(pools), kinds)
    return GroupCosts(shape, Step(1, draw.randint(2, 12), 32_000), seats, m, 1, "bf16")


def channel_bound(group: GroupCosts) -> bool:
    """Whether, with all experts on expert ranks, a channel has more to do than any rank: the paper's assignment looks
    at ranks only, so what it loses there is another matter."""
    held = counts_of(spread(group, range(group.attention_members, group.members)))[0][0]
    channel = sum(float(group.link_seconds(kind, Stream.OUT, held).max()) for kind in (Kind.DISPATCH, Kind.COMBINE))
    ranks = [sum(passes[1] for passes in group.attention[0])]
    ranks += [sum(pair) * count for pair, count in zip(group.expert, held)]
    return channel > max(ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    gains, kinds = [], {}
    for _ in range(args.inputs):
        group = random_group(draw)
        best = balance(group, Limits((10**6,) * group.members), None)
        gain = best.paper_seconds / best.seconds
        gains.append(gain)
        m, n = group.attention_members, group.members - group.attention_members
        kinds.setdefault((channel_bound(group), m % n == 0 or n % m == 0), []).append(gain)
    better = [gain for gain in gains if gain > 1 + 1e-9]
    print(f"{args.inputs} inputs: never worse {min(gains) >= 1}, better on {len(better)}; gain median "
          f"{statistics.median(gains):.3f}, mean {statistics.mean(gains):.3f}, most {max(gains):.3f}")
    for (bound, divides), some in sorted(kinds.items()):
        print(f"  {'channels' if bound else 'ranks'} busiest, {'M | N or N | M' if divides else 'neither divides'}: "
              f"{len(some)} inputs, gain median {statistics.median(some):.3f}, mean {statistics.mean(some):.3f}")
    group = random_group(random.Random(1))
    placement = spread(group, range(group.attention_members, group.members))
    orders = zebra(group.shape.layers, placement, group.attention_members, group.step.microbatches, None)
    counts = np.repeat(counts_of(placement), 100, axis=0)
    start = time.process_time()
    for _ in range(10):
        simulate(orders, TaskCosts(group, placement))
    events = 600 / (time.process_time() - start)
    step_seconds(group, counts)
    start = time.process_time()
    step_seconds(group, counts)
    fast = 6000 / (time.process_time() - start)
    print(f"{group.shape.layers} layers, {group.step.microbatches} microbatches: {events:,.0f} steps a CPU minute by "
          f"events, {fast:,.0f} by the fast path")


if __name__ == "__main__":
    main()
