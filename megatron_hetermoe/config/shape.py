"""The shape of the model, as far as layout, placement, memory and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass, replace


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

    @property
    def decoder_layers(self) -> int:
        """Layers that do not predict further tokens: Megatron's ``--num-layers``."""
        return self.layers - self.mtp_layers

    @property
    def expert_weights(self) -> int:
        """Weight elements of one routed expert, biases not counted."""
        return (3 if self.gated else 2) * self.hidden * self.expert_ffn

    def of_layers(self, layers: range) -> ModelShape:
        """The shape of some layers next to each other, which are then its layers from 1 on."""
        moe = tuple(layer - layers.start + 1 for layer in self.moe_layers if layer in layers)
        further = sum(layer > self.decoder_layers for layer in layers)
        return replace(self, layers=len(layers), moe_layers=moe, mtp_layers=further)
