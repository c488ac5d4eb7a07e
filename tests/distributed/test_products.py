"""Whether a product that a library computes wrongly is found, and none that it computes right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_hetermoe.runtime.products import wrong_products
from megatron_hetermoe.runtime.seen_gpu import LinearLayers

LAYERS = LinearLayers("bfloat16", 4500, 128, (256, 24))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_right_ones(dtype):
    assert wrong_products(replace(LAYERS, dtype=dtype), torch.device("cpu")) == []


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_tile_that_is_left_out(monkeypatch, value):
    right = torch.Tensor.__matmul__

    def wrong(one, other):
        result = right(one, other)
        if other.shape == (128, 24):
            result[4480:, :8] = value
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert wrong_products(LAYERS, torch.device("cpu")) == ["4500 x 128 by 128 x 24"]
