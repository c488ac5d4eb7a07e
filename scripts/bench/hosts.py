"""A real cluster: a rank for each GPU, started on its host by a command such as ``ssh {host}``; the counterpart of ``lab.py``.

Hosts need the same paths, and the folder of the benchmark's output must be on all of them.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import Ended, wait_for

from megatron_hetermoe.runtime.seen_gpu import LinearLayers

_ROOT, _RANK = Path(__file__).parents[2], str(Path(__file__).with_name("host_rank.py"))
_PASSED_ON = ("NCCL_", "CUDA_", "TORCH_", "HETERMOE_", "LD_")  # beginnings of variables that are the same on all hosts
_PORTS = range(20000, 30000)


@dataclass(frozen=True)
class Hosts:
    """Where ranks run.

    Attributes:
        of_pool: a host for each GPU of a pool, by pool.
        command: that starts a process on ``{host}``.
        folder: that all hosts share.
    """

    of_pool: dict[str, Sequence[str]]
    command: str
    folder: Path

    def run(
        self, pools: Sequence[str], argv_of: Callable[[int], Sequence[object]], limit: float, blocks: int | None = None
    ) -> Ended:
        """Runs one Python process a rank, all at once, and waits for them.

        Args:
            pools: of each rank; those of a pool take its GPUs one by one.
            argv_of: a rank's words after ``python``.
            limit: seconds.
            blocks: not read: a GPU has room for those that NCCL takes by itself.
        """
        hosts = self._hosts(pools)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            file = Path(name, "ranks.json")
            file.write_text(json.dumps([
                {"words": list(map(str, argv_of(rank))), "environment": environment}
                for rank, environment in enumerate(environments(hosts))
            ]))
            logs = [Path(name, f"log.{rank}") for rank in range(len(hosts))]
            started = [
                subprocess.Popen([*shlex.split(self.command.format(host=host)), sys.executable, _RANK, str(file), str(rank)],
                                 stdin=subprocess.DEVNULL, stdout=logs[rank].open("w"), stderr=subprocess.STDOUT,
                                 start_new_session=True)
                for rank, host in enumerate(hosts)
            ]
            return Ended(wait_for(started, limit), [log.read_text() for log in logs])

    def problems(self, layers: Sequence[LinearLayers]) -> list[str]:
        """None: ranks have all of a GPU."""
        return []

    def _hosts(self, pools: Sequence[str]) -> list[str]:
        free = {pool: iter(hosts) for pool, hosts in self.of_pool.items()}
        return [next(free[pool]) for pool in pools]


def environments(hosts: Sequence[str]) -> list[dict[str, str]]:
    """The variables of ranks on these hosts, which have a GPU each."""
    same = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    port = _PORTS[time.time_ns() % len(_PORTS)]
    same |= {"WORLD_SIZE": str(len(hosts)), "MASTER_ADDR": hosts[0], "MASTER_PORT": str(port), "LOCAL_RANK": "0",
             "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "4", "PYTHONPATH": str(_ROOT)}
    found = []
    for rank, host in enumerate(hosts):
        found.append({**same, "RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(hosts[:rank].count(host))})
    return found
