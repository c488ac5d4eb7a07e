"""The gated activation's kernels on a GPU: beside Megatron's functions, which torch compiles."""

from __future__ import annotations

import pytest
import torch

from megatron_hetermoe.cli.launch import has_gpu

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs a GPU")
DEVICE = torch.device("cuda", 0)


def inputs(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What goes in, scales, and a gradient of what comes out."""
    draw = torch.Generator(DEVICE).manual_seed(rows)
    inner, grad = (torch.randn(rows, size, generator=draw, device=DEVICE, dtype=torch.bfloat16) for size in (2 * width, width))
    return inner.requires_grad_(), torch.rand(rows, generator=draw, device=DEVICE).requires_grad_(), grad


@pytest.mark.parametrize("rows, width", [(4096, 3584), (5, 768), (1, 1), (0, 64)])
def test_as_megatrons(rows, width):
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

    from megatron_hetermoe.runtime.device import has_kernels
    from megatron_hetermoe.runtime.kernels import scaled_swiglu

    assert has_kernels(DEVICE)
    inner, scale, grad = inputs(rows, width)
    found = scaled_swiglu(inner, scale)
    expected = weighted_bias_swiglu_impl(inner, None, scale.unsqueeze(-1)) if rows else inner.new_empty(0, width)
    torch.testing.assert_close(found, expected)
    if rows:
        for mine, right in zip(*(torch.autograd.grad(result, (inner, scale), grad) for result in (found, expected))):
            torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-2)
    else:
        assert all(not len(part) for part in torch.autograd.grad(found, (inner, scale), grad))


def test_seconds():
    """Printed, beside Megatron's."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

    from megatron_hetermoe.runtime.kernels import scaled_swiglu

    inner, scale, grad = inputs(24576, 3584)
    for name, call in (("ours", scaled_swiglu), ("Megatron's", lambda *of: weighted_bias_swiglu_impl(of[0], None, of[1][:, None]))):
        result = call(inner, scale)
        for way, work in (("forward", lambda call=call: call(inner, scale)),
                          ("backward", lambda result=result: torch.autograd.grad(result, (inner, scale), grad, retain_graph=True))):
            work()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(20):
                work()
            end.record()
            torch.cuda.synchronize()
            print(f"{name} {way}: {start.elapsed_time(end) / 20 * 1e3:.0f} µs")
        assert result.shape == (24576, 3584)
