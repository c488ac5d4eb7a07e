"""Whether matrix products are right on a part of a GPU: cuBLAS takes the number of multiprocessors into account, and with many
numbers of an H200 it left tiles of a product out, which ones depending on its sizes (docs/one-gpu.md)."""

from __future__ import annotations

import torch

from megatron_hetermoe.runtime.seen_gpu import LinearLayers

_TOLERANCE = 0.02  # relative; results of 16 bits differ by less, a tile that is left out makes more
_AT_ONCE = 4096  # rows of a product that are looked at in fp32


def wrong_products(layers: LinearLayers, device: torch.device) -> list[str]:
    """The products of layers' forward and backward that are wrong on a device, each as its shapes; empty where all are
    right. Checked by Freivalds' method: a product times a random vector is the factors times it, one after the other, which
    takes no product of matrices."""
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(getattr(torch, layers.dtype))

    wrong = []
    rows = random(layers.rows, layers.hidden)
    for width in layers.widths:
        weight, grad = random(width, layers.hidden), random(layers.rows, width)
        for one, other in ((rows, weight.t()), (grad, weight), (grad.t(), rows)):
            if _error(one, other, generator) > _TOLERANCE:
                wrong.append(f"{one.shape[0]} x {one.shape[1]} by {other.shape[0]} x {other.shape[1]}")
    return wrong


def _error(one: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> float:
    """Of the device's product of two matrices, relative; infinite where it is no number."""
    vector = torch.randn(other.shape[1], generator=generator, device=other.device)
    found, expected = _times(one @ other, vector), _times(one, _times(other, vector))
    error = ((found - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """A matrix times a vector in fp32, element by element."""
    return torch.cat([(part.float() * vector).sum(dim=1) for part in matrix.split(_AT_ONCE)])
