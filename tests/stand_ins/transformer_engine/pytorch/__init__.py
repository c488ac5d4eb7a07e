"""Modules as transformer-engine has them, by torch's operators."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear
from transformer_engine.pytorch import distributed, fp8

LEFT = "stand-in: a layer leaves gradients of its weights"  # what it says when its first backward does
RANKS = "HETERMOE_TEST_ENGINE_RANKS"  # in the environment: those that have it, with commas between; all without


def _check_there() -> None:
    ranks = os.environ.get(RANKS)
    if ranks is not None and os.environ["RANK"] not in ranks.split(","):
        raise RuntimeError(f"rank {os.environ['RANK']} has no transformer-engine")


class _Module(torch.nn.Module):
    """Has the state that transformer-engine's modules have beside parameters: empty without fp8."""

    def __init__(self):
        super().__init__()
        _check_there()

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or not state.numel()


class LayerNorm(torch.nn.Module):
    """[..., width] normed, with weight and bias."""

    def __init__(self, normalized_shape: int, eps: float, params_dtype: torch.dtype, zero_centered_gamma: bool = False,
                 sequence_parallel: bool = False, device: Any = None):
        super().__init__()
        _check_there()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(normalized_shape, dtype=params_dtype))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(LayerNorm):
    """[..., width] normed, with a weight."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.bias = None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(rows, self.weight.shape, self.weight, self.eps)


class WeightGradStore:
    """What backwards left of gradients of weights, first in first out."""

    def __init__(self, delayed: bool):
        self.enabled = delayed
        self.context: queue.Queue = queue.Queue()
        self.used = False

    def delay_wgrad_compute(self) -> bool:
        return self.enabled

    def put(self, tensors: list[torch.Tensor], function: Callable[..., Any]) -> None:
        if not self.used:
            print(LEFT, flush=True)
        self.used = True
        self.context.put((tensors, function))

    def pop(self) -> Any:
        tensors, function = self.context.get_nowait()
        return function(*tensors)


class _Product(torch.autograd.Function):
    """A linear layer whose backward may leave the gradients of its parameters to a store."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, store: WeightGradStore):
        ctx.save_for_backward(rows, weight)
        ctx.store, ctx.has_bias = store, bias is not None
        return linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        rows, weight = ctx.saved_tensors

        def of_parameters(rows: torch.Tensor, grad: torch.Tensor):
            flat = grad.reshape(-1, grad.shape[-1])
            return flat.t() @ rows.reshape(-1, rows.shape[-1]), flat.sum(dim=0) if ctx.has_bias else None

        found = (None, None)
        if ctx.store.delay_wgrad_compute():
            ctx.store.put([rows, grad], of_parameters)
        else:
            found = of_parameters(rows, grad)
        return grad @ weight, *found, None


class Linear(_Module):
    """[..., in] to [..., out]; with ``return_bias`` the bias is not added but given."""

    def __init__(self, in_features: int, out_features: int, params_dtype: torch.dtype, bias: bool, return_bias: bool,
                 tp_size: int = 1, delay_wgrad_compute: bool = False, fuse_wgrad_accumulation: bool = False,
                 parallel_mode: str | None = None, init_method: Callable[[torch.Tensor], Any] | None = None, **others: Any):
        super().__init__()
        assert tp_size == 1 and not fuse_wgrad_accumulation
        self.in_features, self.out_features, self.parallel_mode = in_features, out_features, parallel_mode
        self.use_bias, self.return_bias = bias, return_bias
        self.weight = torch.nn.Parameter(torch.zeros(out_features, in_features, dtype=params_dtype))
        init_method(self.weight)
        self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else None
        self.wgrad_store = WeightGradStore(delay_wgrad_compute)
        self.wgrad_accumulation_and_reduce_hooks: list[Callable[[], None]] = []
        if delay_wgrad_compute:
            for parameter in (self.weight, *[self.bias] * bias):
                parameter.skip_backward_post_hook = True

    def forward(self, rows: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        added = None if self.return_bias else self.bias
        output = _Product.apply(rows, self.weight, added, self.wgrad_store)
        return (output, self.bias) if self.return_bias else output

    def need_backward_dw(self) -> bool:
        return self.wgrad_store.delay_wgrad_compute()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        self.wgrad_accumulation_and_reduce_hooks.append(hook)

    def backward_dw(self) -> None:
        """Computes what the earliest backward left."""
        if not self.need_backward_dw():
            return
        self.weight.grad, bias_grad = self.wgrad_store.pop()
        if self.use_bias and bias_grad is not None and self.bias.grad is None:
            self.bias.grad = bias_grad
        for hook in self.wgrad_accumulation_and_reduce_hooks:
            hook()


class LayerNormLinear(Linear):
    """A norm and a linear layer in one module."""

    def __init__(self, in_features: int, out_features: int, params_dtype: torch.dtype, eps: float, normalization: str,
                 zero_centered_gamma: bool = False, return_layernorm_output: bool = False, **others: Any):
        super().__init__(in_features, out_features, params_dtype, **others)
        assert not zero_centered_gamma and not return_layernorm_output
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype))
        self.layer_norm_bias = (
            torch.nn.Parameter(torch.zeros(in_features, dtype=params_dtype)) if normalization == "LayerNorm" else None)

    def forward(self, rows: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        functional, width = torch.nn.functional, self.layer_norm_weight.shape
        if self.normalization == "LayerNorm":
            rows = functional.layer_norm(rows, width, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        else:
            rows = functional.rms_norm(rows, width, self.layer_norm_weight, self.eps)
        return super().forward(rows)


class DotProductAttention(_Module):
    """Causal attention: [sequence, batch, heads, head] to [sequence, batch, heads x head]."""

    def __init__(self, softmax_scale: float | None = None, attention_dropout: float = 0.0, **others: Any):
        super().__init__()
        assert not attention_dropout
        self._scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **others: Any) -> torch.Tensor:
        shared = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(shared, dim=2) for tensor in (key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)), is_causal=True, scale=self._scale)
        return attended.permute(2, 0, 1, 3).flatten(start_dim=2)


class GroupedLinear(_Module):
    """Megatron subclasses it."""
