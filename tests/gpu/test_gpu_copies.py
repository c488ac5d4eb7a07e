"""Copies and their sums on a GPU: right, the same each time, and the host waits for nothing."""

from __future__ import annotations

import pytest
import torch

from megatron_hetermoe.cli.launch import has_gpu

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, most", [(4096, 2), (1000, 8), (1, 1), (0, 1)])
def test_against_the_cpu(dtype, rows, most):
    from megatron_hetermoe.runtime.copies import Copies

    draw = torch.Generator().manual_seed(rows + most)
    times = torch.randint(1, most + 1, (rows,), generator=draw)
    source = torch.arange(rows, dtype=torch.int32).repeat_interleave(times)
    source = source[torch.randperm(len(source), generator=draw)]
    tokens = torch.randn(rows, 512, generator=draw).to(dtype)
    outputs = torch.randn(len(source), 512, generator=draw).to(dtype)
    there = [tensor.cuda().requires_grad_(tensor.is_floating_point()) for tensor in (source, tokens, outputs)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [_all(Copies.of(there[0], rows), *there[1:]) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = _all(Copies.of(source, rows), tokens.requires_grad_(), outputs.requires_grad_())
    for first, second, right in zip(*found, expected):
        assert torch.equal(first, second)
        torch.testing.assert_close(first.cpu(), right, rtol=2e-3 if dtype is not torch.bfloat16 else 2e-2, atol=1e-5)


def _all(copies, tokens, outputs):
    expanded, summed = copies.expanded(tokens), copies.summed(outputs)
    grads = torch.autograd.grad((expanded, summed), (tokens, outputs), (outputs.detach(), tokens.detach()))
    return expanded.detach(), summed.detach(), *grads


def test_seconds_of_a_sum():
    """Printed, beside Megatron's way to sum: zeros and scatter_add_."""
    from megatron_hetermoe.runtime.copies import Copies

    rows, hidden = 8192, 4096
    source = torch.arange(rows, dtype=torch.int32, device="cuda").repeat(2)
    outputs = torch.randn(len(source), hidden, device="cuda", dtype=torch.bfloat16)
    copies, index = Copies.of(source, rows), source.long()[:, None].expand(-1, hidden)
    for name, call in (
        ("summed", lambda: copies.summed(outputs)), ("expanded", lambda: copies.expanded(outputs[:rows])),
        ("scatter_add_", lambda: outputs.new_zeros(rows, hidden).scatter_add_(0, index, outputs)),
        ("Copies.of", lambda: Copies.of(source, rows)),
    ):
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            call()
        end.record()
        torch.cuda.synchronize()
        print(f"{name}: {start.elapsed_time(end) / 20 * 1e3:.0f} µs")
    assert copies.summed(outputs).shape == (rows, hidden)
