"""Copies of rows and their sums."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hetermoe.runtime.copies import Copies, by_expert, empty_labels, from_labels, labels_of

SOURCE = torch.tensor([0, 3, 1, 3, 2, 0, 3], dtype=torch.int32)
ROWS = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_each_is_the_other_ones_backward(dtype):
    rows = torch.arange(8, dtype=dtype).view(ROWS, 2).requires_grad_()
    copies = Copies.of(SOURCE, ROWS)
    expanded = copies.expanded(rows)
    assert torch.equal(expanded, rows[SOURCE.long()])
    grad = torch.arange(14, dtype=dtype).view(7, 2)
    expanded.backward(grad)
    expected = torch.zeros(ROWS, 2, dtype=dtype).index_add_(0, SOURCE, grad)
    assert torch.equal(rows.grad, expected)
    outputs = grad.requires_grad_()
    summed = copies.summed(outputs)
    assert torch.equal(summed, expected)
    summed.backward(rows.detach())
    assert torch.equal(outputs.grad, rows.detach()[SOURCE.long()])


def test_half_precision_is_summed_in_fp32():
    """256 and twice 1: bf16 has 8 bits, so one after the other nothing would be added."""
    copies = Copies.of(torch.zeros(3, dtype=torch.int32), 1)
    assert copies.summed(torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)).item() == 258


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_is_rounded_to_even(dtype):
    """A sum of two numbers has such a half as its last bit in one case of nine or so."""
    pairs = torch.randn(100, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    copies = Copies.of(torch.arange(100, dtype=torch.int32).repeat_interleave(2), 100)
    assert torch.equal(copies.summed(pairs.view(200, 8)), pairs[:, 0] + pairs[:, 1])


def test_what_is_not_finite_stays_in_its_row():
    outputs = torch.ones(7, 2)
    outputs[2] = torch.nan
    assert Copies.of(SOURCE, ROWS).summed(outputs).isfinite().all(dim=1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("places, rows, most", [(3, 7, 14), (1, 5, 5), (4, 1, 4), (2, 6, 12), (3, 4, 6)])
def test_where_rows_go(places, rows, most):
    """By place, then by row; what is in the room that is left has no part in sums."""
    goes = torch.rand(places, rows, generator=torch.Generator().manual_seed(rows)) < 0.4
    expected = goes.nonzero()[:, 1]
    there = len(expected)
    copies = Copies.where(goes, most)
    assert len(copies.source) == most and torch.equal(copies.source[:there], expected)
    given = torch.randn(rows, 3, requires_grad=True)
    grad = torch.full((most, 3), torch.nan)
    grad[:there] = torch.randn(there, 3)
    copies.expanded(given).backward(grad)
    torch.testing.assert_close(given.grad, torch.zeros(rows, 3).index_add_(0, expected, grad[:there]))
    outputs = grad[:there].clone().requires_grad_()
    summed = copies.first(there).summed(outputs)
    torch.testing.assert_close(summed, given.grad)
    summed.backward(given.detach())
    assert torch.equal(outputs.grad, given.detach()[expected])


def test_a_row_that_goes_nowhere():
    copies = Copies.where(torch.zeros(2, 3, dtype=torch.bool), 4)
    assert torch.equal(copies.first(0).summed(torch.empty(0, 5)), torch.zeros(3, 5))


def test_no_rows():
    copies = Copies.of(SOURCE[:0], 0)
    rows = torch.empty(0, 2, requires_grad=True)
    copies.summed(copies.expanded(rows)).sum().backward()
    assert rows.grad.shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("copies", [0, 1, 5])
def test_labels_carry_rows_and_probabilities(dtype, copies):
    rows, probs = torch.arange(100, 100 + copies, dtype=torch.int32), torch.rand(copies).to(dtype)
    labels = labels_of(rows, probs)
    buffer = empty_labels(copies, dtype, labels.device).copy_(labels)
    assert (buffer.shape, buffer.dtype) == (labels.shape, labels.dtype)
    for found, given in zip(from_labels(buffer, dtype), (rows, probs)):
        assert found.dtype == given.dtype and torch.equal(found, given)
    if copies == 5:
        assert [torch.equal(a, b) for a, b in zip(from_labels(buffer[2:3], dtype), (rows[2:3], probs[2:3]))] == [True, True]


def test_owners_are_sorted_into_experts():
    counts = [[1, 2], [0, 3]]
    assert by_expert(torch.arange(6), counts, (0, 1)).tolist() == [0, 1, 2, 3, 4, 5]
    assert by_expert(torch.arange(6), counts, (1, 0)).tolist() == [1, 2, 3, 4, 5, 0]


def test_one_kernel_each():
    """An E task is short at few tokens, so what goes around its experts must not be many kernels."""
    class Count(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    copies, rows = Copies.of(SOURCE, ROWS), torch.ones(ROWS, 2, requires_grad=True)
    with Count() as counting:
        summed = copies.summed(copies.expanded(rows))
        summed.backward(torch.ones(ROWS, 2))
    kernels = [name for name in counting.seen if name not in ("detach", "ones", "empty", "slice")]
    assert [name.removesuffix("_forward_only") for name in kernels] == ["index_select", "_embedding_bag"] * 2
