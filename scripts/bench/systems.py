"""The ways to train that are compared: which ranks, and which flags beyond the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_hetermoe.config.plan import MERGED, Plan
from megatron_hetermoe.simulator.baselines import Pipeline
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT

FAST, SLOW = "fast", "slow"  # the pools
KERNELS = {FAST: "flash", SLOW: "efficient"}  # of attention, by pool


@dataclass(frozen=True)
class System:
    """A way to train.

    Attributes:
        pools: of each rank.
        flags: beyond the model's, for a rank with that attention kernel.
        blocks: of NCCL on a GPU, for each communicator. Ours wait beside compute, stock's while nothing else runs.
        layout: in words, where the pools alone do not say it.
        attention_ranks: the first ranks, of a disaggregated run.
    """

    pools: tuple[str, ...]
    flags: Callable[[str], tuple[str, ...]]
    blocks: int = 1
    layout: str = ""
    attention_ranks: int = 0

    @property
    def labels(self) -> tuple[str, ...]:
        """What tells ranks apart that do different things: their roles, in a run that has no roles their pools."""
        if not self.attention_ranks:
            return self.pools
        return (ATTENTION,) * self.attention_ranks + (EXPERT,) * (len(self.pools) - self.attention_ranks)


def stock(pools: Sequence[str]) -> System:
    """Stock expert parallelism over ranks of these pools."""
    return System(tuple(pools), lambda kernel: ("--expert-model-parallel-size", str(len(pools))), blocks=4)


def pipelined(split: Pipeline, fast: int, slow: int) -> System:
    """Stock pipeline parallelism, the fast pool's stages first, with expert parallelism inside each stage.

    Args:
        split: with as many ranks in every stage (``equal_stages``).
        fast, slow: ranks of each pool.
    """
    stages, size = len(split.layers), split.ranks[0]
    layers = "|".join(f"t*{count}" for count in split.layers)
    flags = ("--pipeline-model-parallel-size", str(stages), "--pipeline-model-parallel-layout", f"E{layers}L",
             "--expert-model-parallel-size", str(size))
    layout = f"{'+'.join(map(str, split.stages))} stages of {size}, layers {'+'.join(map(str, split.layers))}"
    return System((FAST,) * fast + (SLOW,) * slow, lambda kernel: flags, blocks=4, layout=layout)


def equal_stages(splits: Iterable[Pipeline], microbatches: int) -> Pipeline | None:
    """The fastest of these pipelines that stock Megatron can run: all stages have as many ranks, each with a microbatch at a
    time, and the step's microbatches are a whole number for each. None if there is no such one."""
    possible = [split for split in splits if len(set(split.ranks)) == 1 and microbatches == split.microbatches * split.ranks[0]]
    return min(possible, key=lambda split: split.seconds, default=None)


def disaggregated(fast: Sequence[str], slow: Sequence[str], *flags: str) -> System:
    """The fast ranks have attention, the slow ones experts."""
    layout = ("--hetermoe", "--hetermoe-attention-ranks", str(len(fast)), "--hetermoe-expert-ranks", str(len(slow)))
    return System((*fast, *slow), lambda kernel: (*layout, "--hetermoe-attention", kernel, *flags), attention_ranks=len(fast))


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


PIPELINE = "pipeline, best split"
# Planned when profiles are there: the placement for attention on the fast pool; the same with all that schedules can do,
# overlapped waves beside the W tasks that it has anyway; and the planner's own choice of layout.
PLANNED = ASYM_EA, EVERYTHING, OWN_LAYOUT = ("zebra, Asym-EA", "zebra, everything", "zebra, planned")
NAMES = (*systems(1, 1), PIPELINE, *PLANNED)


def planned(plan: Plan, folder: Path, ours: Sequence[str]) -> System:
    """A plan's layout; each rank gets the GPU of the pool that the plan took it from."""
    paths = {kernel: folder / f"{kernel}.json" for kernel in KERNELS.values()}
    for kernel, path in paths.items():
        path.write_text(replace(plan, attention_kernel=kernel).to_json())
    m = plan.attention_ranks // plan.groups
    pools = (*plan.pools[:m] * plan.groups, *plan.pools[m:] * plan.groups)
    return System(pools, lambda kernel: ("--hetermoe", "--hetermoe-plan", str(paths[kernel]), *ours),
                  attention_ranks=plan.attention_ranks)
