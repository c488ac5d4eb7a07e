"""Experts that several expert ranks share, against stock Megatron with whole experts."""

from __future__ import annotations

import pytest

TENSOR = {"expert_tensor_parallel_size": 2}


@pytest.mark.parametrize("m, n, g, batch", [(2, 2, 1, 8), (1, 4, 1, 4), (3, 2, 2, 12)])
def test_layout(parity, m, n, g, batch):
    parity.check(m, n, g, global_batch_size=batch, **TENSOR)
