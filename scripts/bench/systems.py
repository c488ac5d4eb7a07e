"""The ways to train that are compared: which ranks, and which flags beyond the model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_hetermoe.config.plan import MERGED, Plan

FAST, SLOW = "fast", "slow"  # the pools
KERNELS = {FAST: "flash", SLOW: "efficient"}  # of attention, by pool


@dataclass(frozen=True)
class System:
    """A way to train.

    Attributes:
        pools: of each rank.
        flags: beyond the model's, for a rank with that attention kernel.
        blocks: of NCCL on a GPU, for each communicator. Ours wait beside compute, stock's while nothing else runs.
    """

    pools: tuple[str, ...]
    flags: Callable[[str], tuple[str, ...]]
    blocks: int = 1


def stock(pools: Sequence[str]) -> System:
    """Stock expert parallelism over ranks of these pools."""
    return System(tuple(pools), lambda kernel: ("--expert-model-parallel-size", str(len(pools))), blocks=4)


def disaggregated(fast: Sequence[str], slow: Sequence[str], *flags: str) -> System:
    """The fast ranks have attention, the slow ones experts."""
    layout = ("--hetermoe", "--hetermoe-attention-ranks", str(len(fast)), "--hetermoe-expert-ranks", str(len(slow)))
    return System((*fast, *slow), lambda kernel: (*layout, "--hetermoe-attention", kernel, *flags))


def systems(fast: int, slow: int, ours: Sequence[str] = ()) -> dict[str, System]:
    """What needs no plan, with so many ranks of each pool, and flags of all that are ours."""
    pools = (FAST,) * fast, (SLOW,) * slow
    return {
        "EP, all ranks": stock((*pools[0], *pools[1])),
        "EP, fast pool alone": stock(pools[0]),
        "EP, slow pool alone": stock(pools[1]),
        "naive disaggregation": disaggregated(*pools, "--hetermoe-schedule", "sequential", *ours),
        "zebra": disaggregated(*pools, "--hetermoe-weight-gradients", MERGED, *ours),
    }


# Planned when profiles are there: the placement for attention on the fast pool, and the planner's own choice of layout.
PLANNED = ("zebra, Asym-EA", "zebra, planned")
NAMES = (*systems(1, 1), *PLANNED)


def planned(plan: Plan, folder: Path, ours: Sequence[str]) -> System:
    """A plan's layout; each rank gets the GPU of the pool that the plan took it from."""
    paths = {kernel: folder / f"{kernel}.json" for kernel in KERNELS.values()}
    for kernel, path in paths.items():
        path.write_text(replace(plan, attention_kernel=kernel).to_json())
    m = plan.attention_ranks // plan.groups
    pools = (*plan.pools[:m] * plan.groups, *plan.pools[m:] * plan.groups)
    return System(pools, lambda kernel: ("--hetermoe", "--hetermoe-plan", str(paths[kernel]), *ours))
