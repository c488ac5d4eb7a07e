"""Whether matrix products are right on a part of a GPU: cuBLAS takes the number of multiprocessors into account, and with some
numbers of an H200 (26, 36, 38, 40, 46, 50, 52, 58; not with 30, 32, 42, 48, 62, 66) it left tiles of a product out."""

from __future__ import annotations

import torch

# Of x [rows, in] and a linear layer's weight [out, in], as models have them: each wrong number above shows in some of these.
_ROWS, _SHAPES = 4096, ((2048, 1024), (1024, 1024), (24, 1024))  # out, in
_TOLERANCE = 0.02  # relative; results of 16 bits differ by less, a tile that is left out makes more


def wrong_products(dtype: torch.dtype, device: torch.device) -> list[str]:
    """The products of a linear layer's forward and backward that are wrong on a device, each as its shapes; empty where all are
    right. Checked by Freivalds' method: a product times a random vector is the factors times it, one after the other, which
    takes no product of matrices."""
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    wrong = []
    for width_out, width_in in _SHAPES:
        rows, weight, grad = random(_ROWS, width_in), random(width_out, width_in), random(_ROWS, width_out)
        for one, other in ((rows, weight.t()), (grad, weight), (grad.t(), rows)):
            if _error(one, other, generator) > _TOLERANCE:
                wrong.append(f"{one.shape[0]} x {one.shape[1]} by {other.shape[0]} x {other.shape[1]}")
    return wrong


def _error(one: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> float:
    """Of the device's product of two matrices, relative; infinite where it is no number."""
    vector = torch.randn(other.shape[1], generator=generator, device=other.device)
    found = ((one @ other).float() * vector).sum(dim=1)
    expected = (one.float() * (other.float() * vector).sum(dim=1)).sum(dim=1)
    error = ((found - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")
