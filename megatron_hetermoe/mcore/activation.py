"""Experts whose activation's output is computed again in the backward, in place of being kept for the second product.

Megatron's ``--recompute-modules moe_act`` (TEGroupedMLP.forward, megatron/core/transformer/moe/experts.py:882) for experts
by torch, one after the other or grouped. Of a row is kept what goes into the activation function, and the probability. The
backward of the second product asks for its input first; then the function runs again, once, and its graph gives the
gradients of what went in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from megatron_hetermoe.runtime.device import has_kernels

_MADE_AGAIN = "hetermoe_made_again"
Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Again:
    """A function's result, which is not kept: it is made when it is asked for, and gone after its backward.

    Args:
        function: of tensors, without parameters.
        inputs: of it, which are kept.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]):
        self.function = function
        self._inputs = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs)
        self._result: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        """The result, without its graph."""
        if self._result is None:
            with torch.enable_grad():
                self._result = self.function(*self._inputs)
        return self._result.detach()

    def gradients(self, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the inputs, from that of the result."""
        self()
        torch.autograd.backward(self._result, grad)
        found = tuple(tensor.grad for tensor in self._inputs)
        self._result, self._inputs = None, ()
        return found


class _Made(torch.autograd.Function):
    """The function, keeping nothing but what ``_Again`` keeps."""

    @staticmethod
    def forward(ctx: Any, again: _Again, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.again = again
        return again.function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.again.gradients(grad)


def expert_again(
    expert: Any, hidden_states: torch.Tensor, per_token_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``MLP.forward`` of an expert, which keeps its activation's input and not its output.

    Args:
        expert: an MLP, or what has its ``config``, ``activation_func``, ``linear_fc1`` and ``linear_fc2``.
        hidden_states: [rows, hidden].
        per_token_scale: [rows].
    """
    inner, bias = expert.linear_fc1(hidden_states)
    inputs = (inner, per_token_scale) if bias is None else (inner, per_token_scale, bias)
    if not torch.is_grad_enabled():
        return _rest(expert, _activated(expert, *inputs), per_token_scale)
    again = _Again(partial(_activated, expert), inputs)
    made = _Made.apply(again, *inputs)
    setattr(made, _MADE_AGAIN, again)
    storage = made.untyped_storage().data_ptr()

    def keep(tensor: torch.Tensor) -> Any:
        is_made = tensor.numel() > 0 and tensor.untyped_storage().data_ptr() == storage
        return (again, tensor.shape) if is_made else tensor

    def give(kept: Any) -> torch.Tensor:
        return kept[0]().view(kept[1]) if isinstance(kept, tuple) else kept

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        return _rest(expert, made, per_token_scale)


def kept(rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    """How a backward gets at the values of a product's input, [rows, width]: kept, or made again."""
    again = getattr(rows, _MADE_AGAIN, None)
    if again is not None:
        return again
    values = rows.detach()
    return lambda: values


def activation_of(config: TransformerConfig, function: Callable[..., Any], bias: torch.Tensor | None = None) -> Activation:
    """What Megatron does between an expert's two products: of [rows, inner] and scales, [rows].

    It is done by Megatron, but for its fused SwiGLU where a device has a kernel of ours (``runtime.kernels``).

    Args:
        config: the expert's.
        function: its activation_func.
        bias: of the first product, [inner].
    """
    between = SimpleNamespace(
        config=config, activation_func=function, linear_fc1=_NoProduct(bias), linear_fc2=_NoProduct(None)
    )

    def activate(inner: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if bias is None and _is_fused_swiglu(config, function) and has_kernels(inner.device):
            from megatron_hetermoe.runtime import kernels

            return kernels.scaled_swiglu(inner, scale)
        return MLP.forward(between, inner, scale)[0]

    return activate


def _is_fused_swiglu(config: TransformerConfig, function: Callable[..., Any]) -> bool:
    """Whether ``MLP.forward`` has one function for SwiGLU and scale, which keeps its input as it is."""
    return (config.bias_activation_fusion and config.gated_linear_unit and function is silu
            and not config.use_te_activation_func and not config.activation_func_fp8_input_store)


def _activated(
    expert: Any, inner: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """An expert's activation, with the bias of its first product."""
    return activation_of(expert.config, expert.activation_func, bias)(inner, scale)


class _NoProduct(torch.nn.Module):
    """In place of a linear layer: gives what it gets, and a bias."""

    def __init__(self, bias: torch.Tensor | None):
        super().__init__()
        self._bias = (bias,)  # not registered: it may be a parameter of another module

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return rows, *self._bias


def _rest(expert: Any, activated: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The second product, with its bias."""
    output, bias = expert.linear_fc2(activated)
    return (output, None) if bias is None else (output + bias.unsqueeze(0) * scale.unsqueeze(-1), None)
