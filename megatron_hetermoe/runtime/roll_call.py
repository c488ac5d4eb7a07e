"""Processes tell each other where they are, before any process group exists."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.runtime.watched import store_is_launchers
from megatron_hetermoe.topology.order import POOL_VARIABLE, Started

_WAY_OUT = "look at what those say that are not there; all must be started with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
FEATURES_VARIABLE = "HETERMOE_FEATURES"  # of all nodes, as `a40-0:a40,big v100-0:v100`; batch scripts know it


def started_here(has_gpu: bool, local_rank: int, engine: bool) -> Started:
    """This process. ``has_gpu`` is whether it computes on one, ``engine`` as of ``Started``."""
    gpu, capability = "", 0.0
    if has_gpu:
        device = local_rank % torch.cuda.device_count()
        gpu = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        capability = major + minor / 10
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    features = dict(entry.partition(":")[::2] for entry in os.environ.get(FEATURES_VARIABLE, "").split())
    return Started(gpu, capability, node, tuple(filter(None, features.get(node, "").split(","))),
                   os.environ.get(POOL_VARIABLE, ""), engine)


def open_store(rank: int, world: int, timeout: timedelta) -> tuple[dist.Store, bool]:
    """The run's store at MASTER_ADDR and MASTER_PORT, in a launcher or in its rank 0.

    It does not wait for all ranks to be there, for they learn through it of each other's end.

    Returns:
        The store, and whether it is in this process.

    Raises:
        UsageError: when it cannot be opened, or reached within the time-out.
    """
    is_host = rank == 0 and not store_is_launchers()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with _reached():
        store = dist.TCPStore(host, port, world, is_master=is_host, wait_for_workers=False, multi_tenant=True, timeout=timeout)
    return store, is_host


def roll_call(store: dist.Store, rank: int, world: int, is_host: bool, said: str) -> list[str]:
    """What every process says, by the launcher's number. All call it, and it returns when all have.

    Args:
        store: for this roll call alone, so with a prefix of its own.
        rank, world: the launcher's numbers.
        is_host: the store is in this process, so this one goes on when all others have read.
        said: this process's text.

    Raises:
        UsageError: when processes do not come within the store's time-out; names them.
    """
    keys = [f"said/{index}" for index in range(world)]
    with _reached():
        store.set(keys[rank], said)
        _await(store, keys)
        answers = [answer.decode() for answer in store.multi_get(keys)]
        if store.add("heard", 1) == world:
            store.set("all heard", "")
        if is_host:
            with contextlib.suppress(dist.DistStoreError):  # for one that has died since, nobody waits
                store.wait(["all heard"])
    return answers


def _await(store: dist.Store, keys: Sequence[str]) -> None:
    try:
        store.wait(list(keys))
    except dist.DistStoreError:
        absent = [str(index) for index, key in enumerate(keys) if not store.check([key])]
        raise UsageError([f"processes {', '.join(absent)} of {len(keys)} have not come within "
                          f"{store.timeout.total_seconds():.0f} s: {_WAY_OUT}"]) from None


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Turns an error of the store's into words."""
    try:
        yield
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError([f"the run's store at {where} does not answer, or its port is taken "
                          f"({' '.join(str(error).split())[:200]}): {_WAY_OUT}"]) from None


def all_started(store: dist.Store, rank: int, world: int, is_host: bool, here: Started) -> list[Started]:
    """All processes by the launcher's number; see ``roll_call``."""
    answers = [json.loads(said) for said in roll_call(store, rank, world, is_host, json.dumps(asdict(here)))]
    return [Started(**{**answer, "features": tuple(answer["features"])}) for answer in answers]
