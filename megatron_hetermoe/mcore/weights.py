"""Gradients of weights in tasks of their own: a backward gives the gradients of activations and leaves the rest.

Megatron splits them for transformer-engine's linear layers only. For its own ones, and for grouped experts, the weight
is hidden from autograd; a hook on the output leaves what the product for the weight needs. That product's result
enters autograd at the weight, so that DDP's hooks find it as they find any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, linear_with_frozen_weight

from megatron_hetermoe.mcore.activation import kept
from megatron_hetermoe.mcore.experts import HeldExperts
from megatron_hetermoe.mcore.grouped import GroupedExperts, joined
from megatron_hetermoe.schedule.tasks import Task

Part = Any  # what one microbatch left of a product
Gradients = Callable[[Sequence[Part]], Sequence[torch.Tensor]]


class WeightGradients:
    """What the backward tasks of one rank have left to its W tasks."""

    def __init__(self) -> None:
        self._left: dict[Task, list[tuple[Sequence[torch.nn.Parameter], Gradients, Part]]] = {}
        self._task: Task | None = None

    @contextmanager
    def left_by(self, task: Task) -> Iterator[None]:
        """What is left inside the context is left by this backward task."""
        self._task = task
        yield
        self._task = None

    def leave(self, weights: Sequence[torch.nn.Parameter], gradients: Gradients, part: Part) -> None:
        """Leaves the gradients of some weights, to be computed by a function of this part, and maybe others."""
        assert self._task is not None, "a gradient outside of any backward task"
        self._left.setdefault(self._task, []).append((weights, gradients, part))

    def run(self, tasks: Sequence[Task]) -> None:
        """A W task: computes what some backward tasks have left, and adds it to the gradients of the weights, once."""
        found: dict[tuple[int, ...], tuple[Sequence[torch.nn.Parameter], Gradients, list[Part]]] = {}
        for task in tasks:
            for weights, gradients, part in self._left.pop(task, ()):
                found.setdefault(tuple(map(id, weights)), (weights, gradients, []))[2].append(part)
        for key in list(found):
            weights, gradients, parts = found.pop(key)  # so that its parts are gone when the next one is copied
            torch.autograd.backward([weight.expand_as(weight) for weight in weights], gradients(parts))


def delay(model: torch.nn.Module, gradients: WeightGradients) -> None:
    """Has all torch linear layers of a model, and grouped experts, leave the gradients of their weights."""
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.leave = gradients.leave
        elif isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module._forward_impl = partial(_linear, module._forward_impl, gradients)


def delay_experts(model: torch.nn.Module, gradients: WeightGradients) -> None:
    """Has a model's experts leave the gradients of their weights."""
    for module in model.modules():
        if isinstance(module, HeldExperts):
            delay(module, gradients)


def _linear(
    original: Callable[..., torch.Tensor], gradients: WeightGradients, input: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None = None, **others: Any,
) -> torch.Tensor:
    """A linear layer of Megatron's, [..., in] to [..., out], whose weight [out, in] gets its gradient later."""
    if not torch.is_grad_enabled() or not weight.requires_grad:
        return original(input=input, weight=weight, bias=bias, **others)
    output = linear_with_frozen_weight(input=input, weight=weight.detach(), bias=None, **others)
    rows = kept(input)
    output.register_hook(lambda grad: gradients.leave([weight], _linear_gradient, (rows(), grad)))
    return output if bias is None else output + bias


@torch.no_grad()
def _linear_gradient(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """[..., in] and [..., out] of each part to [out, in] of all rows."""
    rows, grad = (joined([tensor.reshape(-1, tensor.shape[-1]) for tensor in of]) for of in zip(*parts))
    return [grad.t().matmul(rows)]
