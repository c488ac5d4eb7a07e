"""Whether a product that a library computes wrongly is found, and none that it computes right."""

from __future__ import annotations

import pytest
import torch

from megatron_hetermoe.runtime import products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_ones(monkeypatch, dtype):
    monkeypatch.setattr(products, "_ROWS", 256)
    assert products.wrong_products(dtype, torch.device("cpu")) == []


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_tile_that_is_left_out(monkeypatch, value):
    monkeypatch.setattr(products, "_ROWS", 256)
    right = torch.Tensor.__matmul__

    def wrong(one, other):
        result = right(one, other)
        if other.shape == (1024, 24):
            result[128:, :8] = value
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert products.wrong_products(torch.bfloat16, torch.device("cpu")) == ["256 x 1024 by 1024 x 24"]
