"""``hetermoe profile --network``: what transfers between two pools take, measured on the ranks of both."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_hetermoe.config.errors import Problems, UsageError

_SIZES = tuple(2**power for power in range(12, 27))  # bytes, 4 KiB to 64 MiB
_REPEATS = 5


def run(args: argparse.Namespace, problems: Problems) -> int:
    """Runs the command on one rank; the first one writes the file."""
    from megatron_hetermoe.cost.cluster import read_cluster

    cluster = None
    if not args.cluster or args.recipe:
        problems.add("--network takes a cluster file, --cluster CLUSTER.yaml, and no recipe")
    else:
        try:
            cluster = read_cluster(args.cluster)
        except UsageError as error:
            problems.extend(error)
    world = _number("WORLD_SIZE", problems)
    rank = _number("RANK", problems)
    if cluster is not None:
        first = next(iter(cluster.pools.values()))
        if first.channel or first.channel_host:
            problems.add(f"{args.cluster} has a measured channel already: take channel and channel_host out to measure anew")
        senders = args.attention_ranks or first.gpus
        if world and not 0 < senders < world:
            problems.add(f"{senders} attention ranks of {world} ranks leave no expert rank: say --attention-ranks")
    try:
        problems.raise_if_any()
    except UsageError:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None  # the first rank says it
        raise
    found, queueing = _measure(rank, world, senders)
    if rank == 0:
        lines = [f"  {size}: {seconds:.9f}" for size, seconds in sorted(found.items())]
        text = Path(args.cluster).read_text(encoding="utf-8").rstrip("\n")
        heading = f"# Seconds of a transfer by the bytes of its busiest rank, {senders} attention and " \
                  f"{world - senders} expert ranks.\nchannel:"
        lines += ["# Seconds in which a host queues a transfer of one and of two tensors.",
                  f"channel_host: [{', '.join(f'{seconds:.9f}' for seconds in queueing)}]"]
        Path(args.out).write_text("\n".join([text, heading, *lines]) + "\n", encoding="utf-8")
        largest = max(found)
        print(f"{largest / found[largest] / 1e9:.2f} GB/s at {largest:,} bytes, {1e6 * found[min(found)]:.0f} us at "
              f"{min(found):,}; the host queues one in {1e6 * queueing[0]:.0f} to {1e6 * queueing[-1]:.0f} us; written to {args.out}")
    return 0


def _number(name: str, problems: Problems) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        problems.add(f"{name} is {value!r}: start it on the ranks of both pools, with torchrun or srun, in the order of "
                     f"the cluster file")
        return 0
    return int(value)


def _measure(rank: int, world: int, senders: int) -> tuple[dict[int, float], list[float]]:
    """Seconds of a transfer by its bytes, and those in which a host queues one, by its tensors."""
    import torch
    import torch.distributed as dist

    from megatron_hetermoe.runtime.channels import Channel, nccl_options
    from megatron_hetermoe.runtime.network import measure_channel, measure_queueing

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    device = torch.device("cuda" if on_gpu else "cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    payload = dist.new_group(list(range(world)), pg_options=nccl_options() if on_gpu else None)
    headers = dist.new_group(list(range(world)), backend="gloo")
    channel = Channel(payload, headers, range(world), rank)
    dist.all_reduce(torch.zeros(1, device=device), group=payload)  # makes the communicator before anything is timed
    found = measure_channel(channel, senders, rank, world, _SIZES, _REPEATS, device)
    queueing = measure_queueing(channel, senders, rank, world, _REPEATS, device)
    dist.barrier(group=headers)
    dist.destroy_process_group()
    return found, queueing
