"""Grouped products by the GPU's kernel: the same as one product after the other, and the host waits for nothing."""

from __future__ import annotations

import pytest
import torch

from megatron_hetermoe.cli.launch import has_gpu

pytestmark = pytest.mark.skipif(
    not has_gpu() or torch.cuda.get_device_capability()[0] not in (9, 10), reason="needs a GPU with the kernel"
)


@pytest.mark.parametrize("counts", [[300, 0, 5, 0, 719], [0, 0, 0, 0, 7], [0] * 5, [1] * 5])
def test_against_one_after_the_other(counts):
    from megatron_hetermoe.mcore import grouped

    device = torch.device("cuda")
    buffer = torch.randn(5, 2, 256, 128, device=device, dtype=torch.bfloat16)
    weights = [torch.nn.Parameter(part[0]) for part in buffer]  # with others in between
    rows = torch.randn(sum(counts), 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(sum(counts), 256, device=device, dtype=torch.bfloat16)
    dirty = torch.full((5, 256, 128), float("nan"), device=device, dtype=torch.bfloat16)
    del dirty  # its memory is the next allocation of that size
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        groups = grouped._Groups.of(torch.tensor(counts), device)
        ours = grouped._GroupedProduct.apply(rows, groups, grouped._stacks(weights), *weights)
        mine = torch.autograd.grad(ours, [rows, *weights], grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    one_by_one = torch.cat([part @ weight.t() for part, weight in zip(rows.split(counts), weights)])
    others = torch.autograd.grad(one_by_one, [rows, *weights], grad)
    for one, other in zip((ours, *mine), (one_by_one, *others)):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    for weight_grad, count in zip(mine[1:], counts):
        assert count or not weight_grad.any()
