"""The shape of the model, as far as layout, placement, memory and time depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate


@dataclass(frozen=True)
class ModelShape:
    """A mixture-of-experts transformer.

    Layers are numbered from 1, as in the paper. Sizes are in elements.

    Attributes:
        layers: number of transformer layers, the paper's L less one (see ``schedule.tasks``); those that predict further
            tokens are among them.
        moe_layers: the layers that have routed experts, ascending.
        experts: routed experts in each of them.
        topk: experts that each token goes to.
        hidden: width of a token.
        expert_ffn: width inside one expert.
        dense_ffn: width inside the feed-forward part of a layer without experts.
        shared_expert_ffn: width inside the shared expert, 0 without one.
        gated: whether feed-forward parts have a gate (SwiGLU), so three matrices in place of two.
        heads, query_groups, head_dim: attention heads, key-value heads, width of each.
        tied_embeddings: whether the output layer is the embedding.
        sequence: tokens of one sequence.
        mtp_layers: the last of the layers, which predict one token further each (multi-token prediction).
        kv_lora_rank: width that keys and values are compressed to in multi-latent attention; 0 without it. The widths below
            are its own, and then those of heads and groups above do not count.
        q_lora_rank: width that queries are compressed to; 0 where they are not.
        qk_head_dim, qk_position_dim: of a head's query and key, the part without positions and the part with.
        v_head_dim: of a head's value.
    """

    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    topk: int
    hidden: int
    expert_ffn: int
    dense_ffn: int
    shared_expert_ffn: int
    gated: bool
    heads: int
    query_groups: int
    head_dim: int
    tied_embeddings: bool
    sequence: int
    mtp_layers: int = 0
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_head_dim: int = 0
    qk_position_dim: int = 0
    v_head_dim: int = 0

    @property
    def decoder_layers(self) -> int:
        """Layers that do not predict further tokens: Megatron's ``--num-layers``."""
        return self.layers - self.mtp_layers

    @property
    def query_width(self) -> int:
        """Of all heads' queries together; of keys too, as the attention core reads them in multi-latent attention."""
        return self.heads * (self.qk_head_dim + self.qk_position_dim if self.kv_lora_rank else self.head_dim)

    @property
    def value_width(self) -> int:
        """Of what all heads together put out."""
        return self.heads * (self.v_head_dim if self.kv_lora_rank else self.head_dim)

    @property
    def key_value_width(self) -> int:
        """Of a token's keys and values together, as the attention core reads them."""
        if self.kv_lora_rank:
            return self.query_width + self.value_width
        return 2 * self.query_groups * self.head_dim

    @property
    def latent_width(self) -> int:
        """What multi-latent attention makes of a token before its queries, keys and values: 0 for other attention."""
        return self.q_lora_rank + self.kv_lora_rank + self.qk_position_dim

    @property
    def attention_weights(self) -> int:
        """Weight elements of a layer's attention, norms and biases not counted."""
        output = self.value_width * self.hidden
        if not self.kv_lora_rank:
            return output + self.hidden * (self.query_width + 2 * self.query_groups * self.head_dim)
        queries = self.q_lora_rank * (self.hidden + self.query_width) or self.hidden * self.query_width
        down = self.hidden * (self.kv_lora_rank + self.qk_position_dim)
        return output + queries + down + self.kv_lora_rank * self.heads * (self.qk_head_dim + self.v_head_dim)

    @property
    def expert_weights(self) -> int:
        """Weight elements of one routed expert, biases not counted."""
        return (3 if self.gated else 2) * self.hidden * self.expert_ffn

    def of_layers(self, layers: range) -> ModelShape:
        """The shape of some layers next to each other, which are then its layers from 1 on."""
        moe = tuple(layer - layers.start + 1 for layer in self.moe_layers if layer in layers)
        further = sum(layer > self.decoder_layers for layer in layers)
        return replace(self, layers=len(layers), moe_layers=moe, mtp_layers=further)


def together(shapes: Sequence[ModelShape]) -> ModelShape:
    """The shape of all their layers, one after the other."""
    ends = list(accumulate((shape.layers for shape in shapes), initial=0))
    moe = tuple(end + layer for end, shape in zip(ends, shapes) for layer in shape.moe_layers)
    return replace(shapes[0], layers=ends[-1], moe_layers=moe, mtp_layers=sum(shape.mtp_layers for shape in shapes))
