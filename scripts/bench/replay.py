"""Compares the simulator's step with the executor's, whose tasks wait out their price on this machine's CPU.

    scripts/bench/replay.py [--scale TIMES]

Twelve configurations of layout, placement, wave and channel speed; tasks of 20 ms and more in real processes over real
channels. Prints each step as told and as it was, and the median error. Run it on an idle machine: a rank that the
system does not wake in time counts as an error of the simulator's. What is left is what no price has in it: the meeting
of a transfer's ranks, half a millisecond and more, and the wake-up after each wait. So configurations with
transfers of 1 ms are off most, and of these the one with two waves, whose ramps have most transfers one after the other.
On a machine that does other work too, ``--scale`` has all tasks take longer, so that a late rank counts for less.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy
import torch.distributed as dist
import torch.multiprocessing

from megatron_hetermoe.cost.tasks import Transfer
from megatron_hetermoe.runtime.replay import Case, priced, replay
from megatron_hetermoe.schedule.orders import Schedule, build
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.simulator.events import simulate
from megatron_hetermoe.topology.placement import Placement

RANKS = 4


@dataclass(frozen=True)
class Prices:
    """Seconds of each kind of task, in the form that the simulator asks for."""

    placement: Placement
    attention_members: int
    attention: float
    expert: float
    transfer_seconds: float
    weight_gradients: str = "together"

    @property
    def group(self) -> SimpleNamespace:
        """No two members are taken to be alike; hosts cost nothing."""
        return SimpleNamespace(
            has_host=False,
            seats=[SimpleNamespace(pool=SimpleNamespace(name=str(member))) for member in range(self.placement.members)]
        )

    def seconds(self, member: int, task: Task, microbatches: int) -> float:
        """Backward takes twice as long; an attention rank's experts are as fast as an expert rank's."""
        passes = 2 if task.direction is Pass.BACKWARD else 1
        if task.kind is Kind.ATTENTION:
            return passes * self.attention
        return passes * self.expert * len(self.placement.held(task.layer, member))

    def transfer(self, task: Task) -> Transfer:
        # Each direction has links of its own, so channels do not slow each other down.
        links = (self.transfer_seconds, 0.0) if task.stream is Stream.OUT else (0.0, self.transfer_seconds)
        return Transfer(latency=0.0, seconds=self.transfer_seconds, loads=numpy.array(links))

    def reduction(self, member: int) -> float:
        return 0.0

    def optimizer(self, member: int) -> float:
        return 0.0

    def experts(self, layer: int) -> tuple[int, ...]:
        return tuple(len(self.placement.held(layer, member)) for member in range(self.placement.members))


def configurations(scale: float = 1.0) -> list[tuple[Schedule, Prices]]:
    """Layouts, placements, waves and speeds of channel, four ranks or fewer, with tasks so many times as long."""
    even = Placement(((2, 2, 3, 3), (2, 2, 3, 3)), 4)
    mixed = Placement(((0, 2, 2, 3), (1, 0, 2, 3)), 4)
    lone = Placement(((1, 1), (1, 1)), 2)
    dense = Placement(((), (1, 1), (1, 2)), 3)
    found = []
    for placement, m, name, microbatches, wave in (
        (even, 2, "zebra", 4, None), (even, 2, "zebra", 4, 2), (even, 2, "sequential", 2, None),
        (mixed, 2, "zebra", 3, None), (lone, 1, "zebra", 5, None), (dense, 1, "zebra", 4, None),
    ):
        for attention, expert, transfer in ((0.03, 0.02, 0.001), (0.02, 0.025, 0.02)):
            schedule = build(name, len(placement.holders), placement, m, microbatches, wave)
            found.append((schedule, Prices(placement, m, scale * attention, scale * expert, scale * transfer)))
    return found


def cases(scale: float = 1.0) -> list[Case]:
    """The same, as the executor runs them."""
    return [priced(configuration) for configuration in configurations(scale)]


def predictions(scale: float = 1.0) -> list[float]:
    """Seconds of each configuration as simulated."""
    return [simulate(schedule, prices).seconds for schedule, prices in configurations(scale)]


def _rank(rank: int, port: int, scale: float, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    results.put(replay(rank, RANKS, cases(scale)))
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, metavar="TIMES", help="as long as tasks of 20 to 30 ms")
    scale = parser.parse_args().scale
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, (port, scale, results), nprocs=RANKS)
    measured = [max(of_case) for of_case in zip(*(results.get() for _ in range(RANKS)))]
    told = predictions(scale)
    errors = [real / simulated - 1 for real, simulated in zip(measured, told)]
    for (schedule, prices), real, simulated, error in zip(configurations(scale), measured, told, errors):
        print(f"members {schedule.placement.members}, waves {[len(wave) for wave in schedule.waves]}, "
              f"transfer {prices.transfer_seconds * 1e3:.0f} ms: told {simulated:.3f} s, was {real:.3f} s, {error:+.1%}")
    print(f"median error of {len(errors)}: {statistics.median(map(abs, errors)):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
