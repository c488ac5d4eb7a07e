"""Attention by torch's scaled_dot_product_attention, where there is no transformer-engine.

Stock Megatron's own attention keeps the scores of a whole sequence, [batch, heads, sequence, sequence]. torch has fused
kernels: flash on Ampere and newer, memory-efficient on Volta and Turing too.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}
_FLASH_CAPABILITY = 8  # Ampere


def choose_kernel(asked: str, dtype: torch.dtype, is_gpu: bool, context: int) -> str:
    """The kernel for ``--hetermoe-attention``.

    Args:
        asked: one of ``config.plan.ATTENTION_KERNELS``; ``auto`` takes the fastest that the device has, and Megatron's
            own on the CPU, where numbers are compared with stock, unless it has none for context parallelism.
        dtype: of queries.
        is_gpu: whether this rank computes on a GPU.
        context: ranks that have parts of one sequence.
    """
    if asked != "auto":
        return asked
    if not is_gpu:
        return "megatron" if context == 1 else "math"
    half = dtype in (torch.float16, torch.bfloat16)
    return "flash" if half and torch.cuda.get_device_capability()[0] >= _FLASH_CAPABILITY else "efficient"


class SdpaAttention(MegatronModule):
    """Causal attention as ``DotProductAttention``, which it replaces in a layer's spec.

    Args:
        config: the transformer's.
        layer_number: from 1 on.
        attn_mask_type: causal.
        attention_type: as Megatron passes it.
        attention_dropout: of probabilities; the configuration's if None.
        softmax_scale: factor of scores; 1/sqrt(width of a head) if None.
        cp_comm_type: not read: keys and values are gathered.
        pg_collection: groups of the attention pool.
    """

    kernel = "math"  # or flash, or efficient: with_kernel makes a subclass, since a spec names a class

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str,
        attention_dropout: float | None = None, softmax_scale: float | None = None, cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config)
        assert attn_mask_type is AttnMaskType.causal and config.softmax_type == "vanilla"
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._scale = softmax_scale
        self._context_group = pg_collection.cp if pg_collection else None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None, attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attends.

        Of a sequence in 2C parts, the i-th of C context-parallel ranks has parts i and 2C-1-i, so that all have as many
        scores to compute. Keys and values, which query groups make few, are gathered; their gradients are scattered.

        Args:
            query: [sequence, batch, heads, head], of this rank's parts.
            key, value: [sequence, batch, query groups, head], likewise.
            attention_mask: not read: causal.

        Returns:
            [sequence, batch, heads x head].
        """
        assert attention_bias is None and packed_seq_params is None
        size = self.config.context_parallel_size
        if size == 1:
            return self._attend(query, key, value)
        group = self._context_group
        key, value = (_in_order(gather_from_sequence_parallel_region(part, group=group), size) for part in (key, value))
        place, length = group.rank(), len(query) // 2
        attended = []
        for number, part in zip((place, 2 * size - 1 - place), query.split(length)):
            seen = (number + 1) * length
            attended.append(self._attend(part, key[:seen], value[:seen]))
        return torch.cat(attended)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The last positions of a sequence, of all up to each: [last, batch, heads, head] to [last, batch, heads x head]."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        whole = query.shape[2] == key.shape[2]
        shared = query.shape[1] // key.shape[1]
        grouped = shared > 1 and self.kernel == "flash"  # the other kernels want a key for each head
        if shared > 1 and not grouped:
            key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
        with sdpa_kernel(_KERNELS[self.kernel]):
            attended = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=None if whole else causal_lower_right(query.shape[2], key.shape[2]),
                dropout_p=self._dropout if self.training else 0.0, is_causal=whole, scale=self._scale,
                enable_gqa=grouped,
            )
        return attended.permute(2, 0, 1, 3).flatten(start_dim=2)


def _in_order(gathered: torch.Tensor, size: int) -> torch.Tensor:
    """A sequence, [sequence, ...], of which each of so many ranks has given its two parts, in the order of its parts."""
    parts = gathered.chunk(2 * size)
    return torch.cat([*parts[::2], *reversed(parts[1::2])])


def with_kernel(layer_specs: list[Any], kernel: str) -> list[Any]:
    """Megatron's layer specs with its own attention replaced; others (transformer-engine's) stay.

    Args:
        layer_specs: of a TransformerBlock; one object may stand for several layers, so each is copied.
        kernel: what ``choose_kernel`` gave.
    """
    if kernel == "megatron":
        return layer_specs
    chosen = type("SdpaAttention", (SdpaAttention,), {"kernel": kernel})
    replaced = []
    for spec in layer_specs:
        attention = spec.submodules.self_attention
        if getattr(attention.submodules, "core_attention", None) is DotProductAttention:
            spec, attention = copy(spec), copy(attention)
            spec.submodules = copy(spec.submodules)
            attention.submodules = copy(attention.submodules)
            attention.submodules.core_attention = chosen
            spec.submodules.self_attention = attention
        replaced.append(spec)
    return replaced
