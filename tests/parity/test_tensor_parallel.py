"""Tensor parallelism of attention ranks, against stock Megatron with the same."""

from __future__ import annotations

import pytest

TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize("m, n, g, batch", [(2, 1, 1, 4), (4, 3, 1, 8), (2, 2, 2, 8)])
def test_layout(parity, m, n, g, batch):
    parity.check(m, n, g, global_batch_size=batch, **TENSOR)
