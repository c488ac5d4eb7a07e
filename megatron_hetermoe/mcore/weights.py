"""Gradients of weights in tasks of their own: a backward gives the gradients of activations and leaves the rest.

transformer-engine's linear layers, built so, leave them to a store of their own, and Megatron's DDP waits for them
(``splitting``). For Megatron's own ones, and for grouped experts, the weight is hidden from autograd; a hook on the output
leaves what the product for the weight needs. That product's result enters autograd at the weight, so that DDP's hooks find
it as they find any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
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
        self._calls: dict[Task, list[Callable[[], None]]] = {}
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

    def leave_call(self, call: Callable[[], None]) -> None:
        """Leaves a call that computes gradients of weights and adds them."""
        assert self._task is not None, "a gradient outside of any backward task"
        self._calls.setdefault(self._task, []).append(call)

    def run(self, tasks: Sequence[Task]) -> None:
        """A W task: computes what some backward tasks have left, and adds it to the gradients of the weights, once."""
        found: dict[tuple[int, ...], tuple[Sequence[torch.nn.Parameter], Gradients, list[Part]]] = {}
        for task in tasks:
            for call in self._calls.pop(task, ()):
                call()
            for weights, gradients, part in self._left.pop(task, ()):
                found.setdefault(tuple(map(id, weights)), (weights, gradients, []))[2].append(part)
        for key in list(found):
            weights, gradients, parts = found.pop(key)  # so that its parts are gone when the next one is copied
            torch.autograd.backward([weight.expand_as(weight) for weight in weights], gradients(parts))


def delay(model: torch.nn.Module, gradients: WeightGradients) -> None:
    """Has all linear layers of a model, and grouped experts, leave the gradients of their weights."""
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.leave = gradients.leave
        elif hasattr(module, "need_backward_dw") and module.need_backward_dw():
            module.wgrad_store.put = partial(_put, module, module.wgrad_store.put, gradients)
        elif isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module._forward_impl = partial(_linear, module._forward_impl, gradients)


def delay_experts(model: torch.nn.Module, gradients: WeightGradients) -> None:
    """Has a model's experts leave the gradients of their weights."""
    for module in model.modules():
        if isinstance(module, HeldExperts):
            delay(module, gradients)


def splitting(config: Any) -> None:
    """Has a configuration, the transformer's or DDP's, split the backwards of transformer-engine's linear layers.

    Megatron accepts the flag beside its own schedule only, so it is set when that has been checked.
    """
    config.delay_wgrad_compute = True


def _put(module: Any, put: Callable[..., None], gradients: WeightGradients, *left: Any) -> None:
    """What a layer of transformer-engine's does with what its backward leaves. Its calls find the earliest first, as W tasks
    of a layer come in the order of its backwards."""
    put(*left)
    gradients.leave_call(module.backward_dw)


def _linear(
    original: Callable[..., torch.Tensor], gradients: WeightGradients, input: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None = None, sequence_parallel: bool = False, tp_group: dist.ProcessGroup | None = None,
    **others: Any,
) -> torch.Tensor:
    """A linear layer of Megatron's, [..., in] to [..., out], whose weight [out, in] gets its gradient later.

    Where ranks have parts of the input's sequence, its backward gathers them again, as Megatron's does: in the B task, in
    which all of them take part, and not in W.
    """
    parallel = {"sequence_parallel": sequence_parallel, "tp_group": tp_group}
    if not torch.is_grad_enabled() or not weight.requires_grad:
        return original(input=input, weight=weight, bias=bias, **parallel, **others)
    output = linear_with_frozen_weight(input=input, weight=weight.detach(), bias=None, **parallel, **others)
    rows = kept(input)

    def leave(grad: torch.Tensor) -> None:
        whole = gather_from_sequence_parallel_region(rows(), group=tp_group) if sequence_parallel else rows()
        gradients.leave([weight], _linear_gradient, (whole, grad))

    output.register_hook(leave)
    return output if bias is None else output + bias


@torch.no_grad()
def _linear_gradient(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """[..., in] and [..., out] of each part to [out, in] of all rows."""
    rows, grad = (joined([tensor.reshape(-1, tensor.shape[-1]) for tensor in of]) for of in zip(*parts))
    return [grad.t().matmul(rows)]
