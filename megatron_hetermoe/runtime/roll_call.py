"""Processes tell each other where they are, before any process group exists."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict

import torch
import torch.distributed as dist

from megatron_hetermoe.topology.order import POOL_VARIABLE, Started

FEATURES_VARIABLE = "HETERMOE_FEATURES"  # of all nodes, as `a40-0:a40,big v100-0:v100`; batch scripts know it


def started_here(has_gpu: bool, local_rank: int) -> Started:
    """This process. ``has_gpu`` is whether it computes on one."""
    gpu, capability = "", 0.0
    if has_gpu:
        device = local_rank % torch.cuda.device_count()
        gpu = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        capability = major + minor / 10
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    features = dict(entry.partition(":")[::2] for entry in os.environ.get(FEATURES_VARIABLE, "").split())
    return Started(gpu, capability, node, tuple(filter(None, features.get(node, "").split(","))),
                   os.environ.get(POOL_VARIABLE, ""))


def roll_call(store: dist.Store, rank: int, world: int, is_host: bool, said: str) -> list[str]:
    """What every process says, by the launcher's number. All call it, and it returns when all have.

    Args:
        store: the run's.
        rank, world: the launcher's numbers.
        is_host: the store is in this process, so this one goes on when all others have read.
        said: this process's text.
    """
    keys = [f"said/{index}" for index in range(world)]
    store.set(keys[rank], said)
    store.wait(keys)
    answers = [answer.decode() for answer in store.multi_get(keys)]
    if store.add("heard", 1) == world:
        store.set("all heard", "")
    if is_host:
        store.wait(["all heard"])
    return answers


def all_started(store: dist.Store, rank: int, world: int, is_host: bool, here: Started) -> list[Started]:
    """All processes by the launcher's number; see ``roll_call``."""
    answers = [json.loads(said) for said in roll_call(store, rank, world, is_host, json.dumps(asdict(here)))]
    return [Started(**{**answer, "features": tuple(answer["features"])}) for answer in answers]
