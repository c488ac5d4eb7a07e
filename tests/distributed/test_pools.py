"""The groups of a run: what Megatron's flags say of groups holds for the channels too."""

from __future__ import annotations

import sys
from pathlib import Path

from ranks import run_function

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))


def _timeouts(rank: int, world: int) -> list[set[float]]:
    """Seconds of all groups that this rank is in but the world's, as they are made and when Megatron has changed them."""
    from datetime import timedelta

    import torch
    from megatron.core import parallel_state
    from shapes import shape
    from torch.distributed import distributed_c10d

    from megatron_hetermoe.config.plan import Plan
    from megatron_hetermoe.mcore.pools import join_pools

    join_pools(Plan(shape(), 1, 1, 1, ((1,) * 8,) * 2), timeout_minutes=7)

    def of_groups() -> set[float]:
        groups = [group for group in distributed_c10d._world.pg_map if group is not torch.distributed.group.WORLD]
        return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}

    made = of_groups()
    parallel_state.update_pg_timeout(timedelta(seconds=90))
    return [made, of_groups()]


def test_channels_wait_as_long_as_the_flags_say():
    """--distributed-timeout-minutes, and --distributed-timeout-seconds-after-init."""
    assert run_function(_timeouts, 2) == [[{420.0}, {90.0}]] * 2
