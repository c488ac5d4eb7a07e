"""One cell: trains once on the ranks of a cluster, or of what stands for one, and reads what they wrote."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import lab
from lab import Ended, Rank
from paper_models import STEPS
from systems import FAST, KERNELS, SLOW, System

from megatron_hetermoe.runtime.seen_gpu import LinearLayers

WARM_UP = 4  # steps left out: routing is uneven at first, and graphs are captured
_HANGS = 0.9  # of the limit, after which a rank shows its stacks and ends


class Machine(Protocol):
    """Where ranks of the two pools run: ``Shares`` or ``hosts.Hosts``."""

    def run(
        self, pools: Sequence[str], argv_of: Callable[[int], Sequence[object]], limit: float, blocks: int | None = None
    ) -> Ended:
        """Runs one Python process for each of these ranks, as ``lab.run``."""
        ...

    def problems(self, layers: Sequence[LinearLayers]) -> list[str]:
        """What keeps ranks there from computing these layers right."""
        ...


@dataclass(frozen=True)
class Shares:
    """A cluster's stand-in: GPUs that ranks share.

    Attributes:
        shares: of a GPU for a rank of each pool, in percent.
        gpus: the pools' ranks are on one together, or on one each.
    """

    shares: dict[str, int]
    gpus: int

    def ranks(self, pools: Sequence[str]) -> list[Rank]:
        """Virtual GPUs of these pools."""
        return [Rank(self.shares[pool], KERNELS[pool], pool, (FAST, SLOW).index(pool) % self.gpus) for pool in pools]

    def run(
        self, pools: Sequence[str], argv_of: Callable[[int], Sequence[object]], limit: float, blocks: int | None = None
    ) -> Ended:
        """As ``lab.run``."""
        return lab.run(self.ranks(pools), argv_of, limit, blocks)

    def problems(self, layers: Sequence[LinearLayers]) -> list[str]:
        """Shares in which products are wrong."""
        return lab.wrong_shares(self.ranks((FAST, SLOW)), layers)


def measure(
    system: System, flags: Sequence[str], machine: Machine, folder: Path, limit: float, longer: float = 0.0
) -> dict:
    """Trains once.

    Args:
        system: the way to train.
        flags: the model's; steps after those that are timed are profiled.
        machine: where.
        folder: that all ranks can write to.
        limit: seconds after which ranks are ended.
        longer: seconds that each byte of traffic is to take longer (``throttle.py``).

    Returns:
        the cell's figures, or why there are none.
    """
    kernels = [KERNELS[pool] for pool in system.pools]
    record = folder / "record"
    ended = machine.run(system.pools, lambda index: [
        Path(__file__).with_name("rank.py"), record, kernels[index], _HANGS * limit, "--timed", STEPS, "--longer", longer,
        "--", *flags, *system.flags(kernels[index])], limit, system.blocks)
    records = [lines_of(Path(f"{record}.{rank}")) for rank in range(len(kernels))]
    if ended.failure and not all(len(of_rank) >= STEPS for of_rank in records):
        return ended.failure
    # Where only the profiler failed, the steps before are what they are.
    return {**figures(records, system.labels), **({"after": ended.failure} if ended.failure else {})}


def lines_of(record: Path) -> list[dict]:
    """What a rank wrote, as far as it came."""
    lines = record.read_text().split("\n")[:-1] if record.exists() else []
    return [json.loads(line) for line in lines]


def figures(records: Sequence[Sequence[dict]], labels: Sequence[str]) -> dict:
    """A cell's figures from what its ranks wrote (``record.py``), or why there are none.

    Args:
        records: of each rank.
        labels: what each rank's share of a step counts for (``System.labels``).
    """
    steps = [[line for line in of_rank if "seconds" in line] for of_rank in records]
    loss = [step["loss"] for step in steps[-1]]
    if not all(one is not None and math.isfinite(one) for one in loss):
        return {"failed": "the loss is no number", "loss": loss}
    # A step is as long as on the rank where it takes longest.
    seconds, tasks = ([max(step[part] for step in at_once) for at_once in zip(*steps)] for part in ("seconds", "tasks"))
    found = {
        "seconds": statistics.median(seconds[WARM_UP:]), "tasks": statistics.median(tasks[WARM_UP:]), "steps": seconds,
        "loss": loss, "memory": [max(step["memory"] for step in of_rank) for of_rank in steps],
    }
    profiled = [line["profiled"] for of_rank in records for line in of_rank if "profiled" in line]
    if len(profiled) == len(records):
        longest = max(line["seconds"] for line in profiled)
        found["busy"] = {
            kind: {label: statistics.mean(line[part] for line, own in zip(profiled, labels) if own == label) / longest
                   for label in dict.fromkeys(labels)}
            for kind, part in (("kernels", "compute"), ("nccl", "nccl"))
        }
    return found
