"""What ranks' GPUs cannot do of a plan, found when processes have said where they are and before any process group exists."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.mcore.grouped import grouped_obstacle
from megatron_hetermoe.mcore.implementation import ENGINE, engine_obstacle
from megatron_hetermoe.runtime.device import is_gpu
from megatron_hetermoe.topology.layout import ATTENTION, layout_of
from megatron_hetermoe.topology.order import Started
from megatron_hetermoe.topology.placement import Placement

_BF16_CAPABILITY = (8, 0)  # Ampere; torch.cuda.is_bf16_supported() counts emulation too


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a device, None for the CPU."""
    return torch.cuda.get_device_capability(device) if is_gpu(device) else None


def device_problems(
    plan: Plan, has_biases: bool, dense_impl: str, started: Mapping[int, Started]
) -> list[str]:
    """What a plan asks of ranks' GPUs in vain, one sentence each.

    Args:
        plan: the run's.
        has_biases: whether linear layers have biases.
        dense_impl: ``--transformer-impl``.
        started: the processes, by the rank that each has become.
    """
    layout = layout_of(plan)
    placement = Placement(plan.placement, layout.holders)
    problems = []
    for rank, process in sorted(started.items()):
        found = divmod(round(10 * process.capability), 10) if process.capability else None
        holds = bool(placement.layers_of(layout.holder_of(rank)))
        without = engine_obstacle(found, process.engine)
        if without and dense_impl == ENGINE and layout.role(rank) == ATTENTION:
            problems.append(f"--transformer-impl transformer_engine cannot be on attention rank {rank}: {without}; use local, or "
                            f"give attention to others")
        if without and plan.expert_impl == ENGINE and holds:
            problems.append(f"--hetermoe-expert-impl transformer_engine cannot be on rank {rank}: {without}; use auto")
        lacks_bf16 = found is not None and found < _BF16_CAPABILITY
        if lacks_bf16 and plan.attention_precision == "bf16" and layout.role(rank) == ATTENTION:
            problems.append(f"rank {rank} has a GPU without bf16 ({_version(found)}) for attention in bf16: train with "
                            f"--fp16, or give attention to others")
        if lacks_bf16 and plan.expert_precision == "bf16" and holds:
            problems.append(f"rank {rank} has a GPU without bf16 ({_version(found)}) for experts in bf16: add "
                            f"--hetermoe-expert-precision fp16")
        if plan.expert_kernel == "grouped" and holds:
            obstacle = grouped_obstacle(plan, has_biases, found)
            if obstacle:
                problems.append(f"--hetermoe-experts grouped cannot be on rank {rank}: {obstacle}; use auto")
    return problems


def _version(found: tuple[int, int]) -> str:
    return f"compute capability {found[0]}.{found[1]}"
