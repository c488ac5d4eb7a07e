"""What a rank computes on."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache

import torch

_TRITON_FROM = (8, 0)  # compute capability; Triton 3 makes nothing for older ones


def is_gpu(device: torch.device) -> bool:
    """Whether tensors of a device are on a GPU. One is asked, since in processes without a GPU that train, devices are called
    CUDA's all the same."""
    return torch.empty(0, device=device).is_cuda


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether a device runs ``runtime.kernels``. One of them is tried, since Triton needs a C compiler too."""
    if not is_gpu(device) or not importlib.util.find_spec("triton") or torch.cuda.get_device_capability(device) < _TRITON_FROM:
        return False
    from megatron_hetermoe.runtime import kernels

    try:
        starts = torch.zeros(2, dtype=torch.int64, device=device)
        kernels.summed(torch.ones(1, 1, device=device), starts, starts)
    except Exception as error:  # whatever Triton, its compiler or the compiler of C raises
        print(f"hetermoe: warning: Triton's kernels do not run here ({error}), so torch's do, which are slower", file=sys.stderr)
        return False
    return True
