"""How processes meet: the run's store, which rank each one becomes, the world's process group."""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.mcore.devices import device_problems
from megatron_hetermoe.mcore.implementation import is_installed
from megatron_hetermoe.mcore.platform import cpu
from megatron_hetermoe.runtime.roll_call import all_started, open_store, started_here
from megatron_hetermoe.runtime.watched import attempt, store_is_launchers
from megatron_hetermoe.topology.layout import Layout
from megatron_hetermoe.topology.order import (
    POOLS_VARIABLE, describe_order, parse_patterns, pool_order,
)


def meet(args: argparse.Namespace, plan: Plan, layout: Layout) -> tuple[dist.Store, int | None]:
    """Opens the run's store, and changes this process's rank to that in pool order. It comes before all else.

    Returns:
        The store, and the rank whose process has it; None where it is the launcher's.

    Raises:
        UsageError: on all ranks, when processes do not come, or do not fit the layout, or their GPUs what they are to do.
    """
    store, is_host = open_store(args.rank, args.world_size, timedelta(minutes=args.distributed_timeout_minutes))
    here = started_here(not cpu.needed(), args.local_rank, is_installed())
    started = all_started(dist.PrefixStore(attempt(), store), args.rank, args.world_size, is_host, here)
    # Only now may a rank refuse: nobody waits for the store of one that has left.
    problems = Problems()
    patterns = parse_patterns(os.environ.get(POOLS_VARIABLE, ""), problems)
    problems.raise_if_any()
    ranks = pool_order(started, layout, plan.pools, patterns)
    for problem in device_problems(plan, args.add_bias_linear, args.transformer_impl, dict(zip(ranks, started))):
        problems.add(problem)
    problems.raise_if_any()
    args.rank = ranks[args.rank]
    os.environ["RANK"] = str(args.rank)
    if args.rank == 0 and len(set(map(str, started))) > 1:
        order = "the launcher's order" if list(ranks) == sorted(ranks) else "pool order, which is not the launcher's"
        print(f"hetermoe: ranks are in {order}: {describe_order(started, ranks)}", flush=True)
    return store, None if store_is_launchers() else ranks[0]


def join_world(args: argparse.Namespace, store: dist.Store) -> None:
    """The world's group. Megatron finds it made, and skips its own set-up of it and of the groups inside."""
    # Ranks may share a GPU where NCCL lets them; without that NCCL names the GPU that is there twice.
    torch.cuda.set_device(args.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        args.distributed_backend, store=dist.PrefixStore("default_pg", store), rank=args.rank,
        world_size=args.world_size, timeout=timedelta(minutes=args.distributed_timeout_minutes),
    )
    # torch's barrier takes the device of a group's first collective and, where there was none, guesses it from the rank,
    # which in pool order is not a device's number.
    dist.all_reduce(torch.zeros(1, device="cuda"))
