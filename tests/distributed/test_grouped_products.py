"""Grouped products on their own: where weights lie, and what a kernel leaves undone."""

from __future__ import annotations

import torch
from ranks import run_function

COUNTS = [3, 0, 5, 4, 2, 0]


def _products(rank: int, world: int, layout: str) -> tuple[list[tuple[int, int]], list[float]]:
    """How the weights are divided, and the errors of output and gradients against one product after the other."""
    from megatron_hetermoe.mcore import grouped

    buffer = torch.randn(2000)
    weights = [torch.nn.Parameter(torch.empty(0)) for _ in COUNTS]
    for index, weight in enumerate(weights):
        start = index * (16 * 8 + 64) + (100 if layout == "bucket" and index >= 3 else 0)
        data = buffer[start:start + 16 * 8].view(16, 8)
        weight.data = data.clone() if layout == "apart" else data
    rows, grad = torch.randn(sum(COUNTS), 8, requires_grad=True), torch.randn(sum(COUNTS), 16)
    groups = grouped._Groups.of(torch.tensor(COUNTS), torch.device("cpu"))
    stacks = grouped._stacks(weights)
    runs = [(part.start, part.stop) for part, _ in map(groups.of_stack, stacks)]
    kernel = grouped.grouped_mm

    def untidy(one: torch.Tensor, other: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """As some GPUs' kernel: what belongs to an empty group is what was there before."""
        result = kernel(one, other, offs=offs)
        if result.dim() == 3:
            result[torch.diff(offs, prepend=torch.zeros(1)) == 0] = float("nan")
        return result

    grouped.grouped_mm = untidy
    ours = grouped._GroupedProduct.apply(rows, groups, stacks, *weights)
    mine = torch.autograd.grad(ours, [rows, *weights], grad)
    one_by_one = torch.cat([part @ weight.t() for part, weight in zip(rows.split(COUNTS), weights)])
    other = torch.autograd.grad(one_by_one, [rows, *weights], grad)
    return runs, [(a - b).abs().max().item() for a, b in zip((ours, *mine), (one_by_one, *other))]


def test_one_kernel_for_weights_at_equal_distances():
    [(runs, errors)] = run_function(_products, 1, "even")
    assert runs == [(0, 14)]
    assert max(errors) < 1e-5


def test_weights_across_the_end_of_a_bucket():
    [(runs, errors)] = run_function(_products, 1, "bucket")
    assert runs == [(0, 8), (8, 14)]
    assert max(errors) < 1e-5


def test_weights_that_are_apart():
    [(runs, errors)] = run_function(_products, 1, "apart")
    assert runs == [(0, 3), (3, 3), (3, 8), (8, 12), (12, 14), (14, 14)]
    assert max(errors) < 1e-5


def _errors_of_parts(rank: int, world: int) -> list[float]:
    """Gradients of weights from the rows of three microbatches at once, one of them without any, against the sum of each."""
    from megatron_hetermoe.mcore import grouped

    weights = [torch.nn.Parameter(weight) for weight in torch.randn(len(COUNTS), 16, 8)]
    parts = [(torch.randn(sum(counts), 16), torch.randn(sum(counts), 8),
              grouped._Groups.of(torch.tensor(counts), torch.device("cpu")))
             for counts in (COUNTS, [0] * len(COUNTS), [1, 2, 0, 3, 0, 1])]
    stacks = grouped._stacks(weights)
    ours = grouped._weight_grads_of(stacks, parts)
    one_by_one = map(sum, zip(*(grouped._weight_grads(*part, stacks) for part in parts)))
    return [(a - b).abs().max().item() for a, b in zip(ours, one_by_one, strict=True)]


def test_rows_of_several_microbatches_are_one_product():
    [errors] = run_function(_errors_of_parts, 1)
    assert len(errors) == len(COUNTS) and max(errors) < 1e-5
