"""Process groups: one complete set of Megatron's for each pool, two channels for each ZP group, one for control."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.runtime.channels import Channel, nccl_options
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT, Layout, layout_of

# Every group that Megatron made, whichever pool for; it walks them to set timeouts.
_SHARED_GLOBALS = {"_global_process_group_list"}


def join_pools(plan: Plan, timeout_minutes: int) -> Session:
    """Makes all process groups of a run and leaves Megatron with those of this rank's pool.

    Creating a group is collective over the world, so every rank makes those of both pools, in the same order.

    Args:
        plan: the layout to build.
        timeout_minutes: after which what a group waits for counts as lost.

    Returns:
        This rank's session.
    """
    layout = layout_of(plan)
    rank = dist.get_rank()
    assert dist.get_world_size() == layout.world_size
    device = torch.device(torch.cuda.current_device())
    # Megatron's function keeps a list of groups, by which it changes their timeouts later on.
    make_group = partial(parallel_state.create_group, timeout=timedelta(minutes=timeout_minutes))
    control = make_group(range(layout.world_size), backend="gloo")
    out = back = None
    options = nccl_options() if dist.get_backend() == "nccl" else None
    for ranks in layout.zp_groups():
        pairs = [
            (make_group(ranks, pg_options=options), make_group(ranks, backend="gloo")) for _ in range(2)
        ]
        if rank in ranks:
            out, back = (Channel(*pair, ranks, layout.member_of(rank)) for pair in pairs)
            for payload, _ in pairs:
                # Makes the communicator, which members that send or receive nothing at first would not.
                dist.all_reduce(torch.zeros(1, device=device), group=payload)
    stages = _stages(layout, rank, device, make_group) if layout.stages > 1 else None
    own: dict[str, object] = {}
    blank = _parallel_state()
    for role in (ATTENTION, EXPERT):
        _restore(blank)
        pool = layout.pool(role)
        experts = layout.expert_parallel(role)[0]
        parallel_state.initialize_model_parallel(
            rank_offset=pool.start,
            local_world_size=len(pool),
            tensor_model_parallel_size=len(layout.tensor_parallel(role)[0]),
            pipeline_model_parallel_size=layout.stages,
            virtual_pipeline_model_parallel_size=plan.virtual_stages if plan.virtual_stages > 1 else None,
            context_parallel_size=len(layout.context_parallel(role)[0]),
            expert_model_parallel_size=len(experts),
            expert_tensor_parallel_size=len(layout.expert_tensor_parallel(role)[0]),
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_minutes,
        )
        if role == layout.role(rank):
            own = _parallel_state()
    _restore(own)
    _check_groups(layout, rank)
    # train() counts consumed samples by the data-parallel size; it is the attention pool's, in both pools.
    parallel_state._MPU_DATA_PARALLEL_WORLD_SIZE = layout.microbatches
    return Session(plan, rank, control, out, back, device, stages=stages)


def _stages(
    layout: Layout, rank: int, device: torch.device, make_group: Callable[..., dist.ProcessGroup]
) -> Channel | None:
    """The channel along this rank's pipeline; all ranks call it."""
    own = None
    for ranks in layout.pipeline_parallel(ATTENTION):
        pair = make_group(ranks), make_group(ranks, backend="gloo")
        if rank in ranks:
            own = Channel(*pair, ranks, ranks.index(rank))
            dist.all_reduce(torch.zeros(1, device=device), group=pair[0])  # makes the communicator
    return own


def _parallel_state() -> dict[str, object]:
    """Megatron's process groups and sizes, as its module globals have them."""
    return {
        name: value for name, value in vars(parallel_state).items()
        if name.startswith("_") and (name.isupper() or name in _SHARED_GLOBALS)
    }


def _restore(state: dict[str, object]) -> None:
    for name, value in state.items():
        if name not in _SHARED_GLOBALS:
            setattr(parallel_state, name, value)


def _check_groups(layout: Layout, rank: int) -> None:
    """Megatron's groups are those that the topology describes; all else is computed from the latter."""
    role = layout.role(rank)
    expected = {
        "tensor parallel": (parallel_state.get_tensor_model_parallel_group(), layout.tensor_parallel(role)),
        "pipeline parallel": (
            parallel_state.get_pipeline_model_parallel_group(), layout.pipeline_parallel(role)
        ),
        "context parallel": (parallel_state.get_context_parallel_group(), layout.context_parallel(role)),
        "data parallel": (
            parallel_state.get_data_parallel_group(with_context_parallel=True), layout.data_parallel(role)
        ),
        "expert tensor parallel": (
            parallel_state.get_expert_tensor_parallel_group(), layout.expert_tensor_parallel(role)
        ),
        "expert parallel": (parallel_state.get_expert_model_parallel_group(), layout.expert_parallel(role)),
        "expert data parallel": (
            parallel_state.get_expert_data_parallel_group(), layout.expert_data_parallel(role)
        ),
    }
    for name, (group, described) in expected.items():
        assert tuple(dist.get_process_group_ranks(group)) == _own(described, rank), f"{name} group of rank {rank}"


def _own(groups: Iterable[tuple[int, ...]], rank: int) -> tuple[int, ...]:
    return next(group for group in groups if rank in group)

