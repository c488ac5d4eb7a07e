"""Initial weights where GPUs are of several kinds.

Which number of a stream an element of a long tensor gets depends on how many multiprocessors the GPU has that draws it
(torch's calc_execution_policy, ATen/native/cuda/DistributionTemplates.h). So the same seed gives an A40 and a V100 other
weights, and ranks that are each other's replicas, which stock Megatron has draw for themselves, would train apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hetermoe.runtime.device import is_gpu

_AT_ONCE = 1 << 16  # elements that 8 multiprocessors draw in one go


@torch.no_grad()
def draw(weight: torch.Tensor, initialise: Callable[[torch.Tensor], Any]) -> None:
    """Draws a weight's initial values, by Megatron's normal distributions the same ones on every kind of GPU.

    Args:
        weight: contiguous.
        initialise: one of Megatron's init methods. One that looks at the weight's shape draws it in one go.
    """
    is_normal = isinstance(initialise, partial) and initialise.func is torch.nn.init.normal_
    for part in weight.view(-1).split(_AT_ONCE) if is_normal else [weight]:
        initialise(part)


@torch.no_grad()
def agree(model: torch.nn.Module, groups: ProcessGroupCollection) -> None:
    """Gives the replicas of each parameter the values of the first.

    Args:
        model: before it is wrapped.
        groups: of this rank's pool.
    """
    for parameter in model.parameters():
        replicas = groups.dp_cp if getattr(parameter, "allreduce", True) else groups.expt_dp
        if replicas.size() > 1:
            dist.broadcast(parameter.data, dist.get_global_rank(replicas, 0), replicas)


def draw_alike(device: torch.device, control: dist.ProcessGroup) -> bool:
    """Whether the devices of all ranks of a gloo group, which call this together, make the same of a seed."""
    kinds: list[Any] = [None] * control.size()
    dist.all_gather_object(kinds, kind_of(device), control)
    return len(set(kinds)) == 1


def kind_of(device: torch.device) -> tuple[str, int]:
    """All that a device's random numbers depend on: what it is called, and how many multiprocessors it has."""
    if not is_gpu(device):
        return "CPU", 0
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count
