"""Triton's kernels, by its interpreter, which a process has from its start or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hetermoe.runtime.device import has_kernels

pytest.importorskip("triton", reason="torch for the CPU alone comes without Triton")

ROOT = Path(__file__).parents[2]
BEGIN = """
import torch
from torch.nn.functional import silu
from megatron_hetermoe.runtime import kernels
draw = torch.Generator().manual_seed(1)
"""
SUMS = """
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for width in (1, 40, 1500):  # less than a program takes, no power of two, more
        copies = torch.randn(6, width, generator=draw).to(dtype)
        by_row, starts = torch.tensor([5, 1, 0, 2, 3, 4, 0, 0]), torch.tensor([0, 2, 2, 6])
        found = kernels.summed(copies, by_row, starts)
        wide = copies.to(torch.promote_types(dtype, torch.float32))
        expected = torch.stack([wide[[5, 1]].sum(0), 0 * wide[0], wide[[0, 2, 3, 4]].sum(0)])
        assert found.dtype is dtype
        torch.testing.assert_close(found, expected.to(dtype))
assert kernels.summed(copies, by_row, starts[:1]).shape == (0, width)
assert not kernels.summed(copies[:0], by_row[:0], torch.zeros(4, dtype=torch.int64)).any()
"""
SWIGLU = """
for dtype in (torch.float32, torch.bfloat16):
    for rows, width in ((3, 100), (2, 1300), (0, 8)):
        inner = torch.randn(rows, 2 * width, generator=draw).to(dtype).requires_grad_()
        scale = torch.rand(rows, generator=draw).requires_grad_()
        grad = torch.randn(rows, width, generator=draw).to(dtype)
        found = kernels.scaled_swiglu(inner, scale)
        gate, value = inner.float().chunk(2, dim=-1)
        expected = (silu(gate) * value * scale[:, None]).to(dtype)
        torch.testing.assert_close(found, expected)
        for mine, right in zip(*(torch.autograd.grad(result, (inner, scale), grad) for result in (found, expected))):
            assert mine.dtype is right.dtype
            torch.testing.assert_close(mine, right)
"""


@pytest.mark.parametrize("script", [SUMS, SWIGLU], ids=["sums", "swiglu"])
def test_interpreted(script):
    ended = subprocess.run([sys.executable, "-c", BEGIN + script], env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT,
                           capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_a_device_without_them(monkeypatch, capsys):
    """The CPU; a GPU that is too old; one on which they cannot be made, which is said."""
    from megatron_hetermoe.runtime import device, kernels

    def fail(*args):
        raise RuntimeError("no C compiler")

    assert not has_kernels(torch.device("cpu"))
    monkeypatch.setattr(device, "is_gpu", lambda of: True)
    monkeypatch.setattr(kernels, "summed", fail)
    for capability, said in (((7, 0), ""), ((8, 0), "no C compiler")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of, capability=capability: capability)
        assert not has_kernels.__wrapped__(torch.device("cpu"))
        assert said in capsys.readouterr().err
