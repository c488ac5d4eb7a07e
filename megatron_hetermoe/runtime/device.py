"""Whether a rank computes on a GPU."""

from __future__ import annotations

import torch


def is_gpu(device: torch.device) -> bool:
    """Whether tensors of a device are on a GPU. One is asked, since in processes without a GPU that train, devices are called
    CUDA's all the same."""
    return torch.empty(0, device=device).is_cuda
