"""Multi-token prediction: further layers behind the model's own, each of which predicts one token further.

Such a layer joins what the one before it made of a token with the embedding of a later token, and is then a layer like the
others, with experts of its own. So tasks number it as one. Megatron's nodes of it would go through the graph of its final
norm twice where there are two such layers (its own schedule has one at most), and would read other tokens each time they
run again; the functions here stand in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

Submodule = Callable[..., Any]  # of one of Megatron's nodes: called with the node and its inputs


def projecting(attend: Submodule, predictor: MultiTokenPredictionLayer) -> Submodule:
    """``pre_dispatch_computation`` of two inputs, [s, b, h] each: hidden states and a later token's embedding."""

    def run(node: Any, hidden: torch.Tensor, embedded: torch.Tensor) -> Any:
        return attend(node, predictor._concat_embeddings(hidden, embedded))

    return run


def embedding_later(attend: Submodule, predictor: MultiTokenPredictionLayer) -> Submodule:
    """``projecting`` of the hidden states [s, b, h] alone. Moves the microbatch's tokens on by one, so it runs once."""

    def run(node: Any, hidden: torch.Tensor) -> Any:
        state = node.chunk_state
        if node.is_first_layer:
            state.mtp_hidden_states = [hidden]
        state.input_ids, state.position_ids, state.padding_mask, embedded, hidden = predictor._get_embeddings(
            input_ids=state.input_ids, position_ids=state.position_ids, embedding=state.model.embedding,
            hidden_states=hidden, packed_seq_params=state.packed_seq_params, padding_mask=state.padding_mask,
        )
        return attend(node, hidden, embedded)

    return run


def predicting(end: Submodule, predictor: MultiTokenPredictionLayer) -> Submodule:
    """The end of such a layer with its own final norm.

    The last one's result is the head's input, [(1 + further tokens) * s, b, h]: that of the model's last layer, then each
    further one's. Megatron's head has a loss for each part (``process_mtp_loss``).
    """

    def run(node: Any, outputs: torch.Tensor) -> torch.Tensor:
        hidden = predictor._postprocess(end(node, outputs))
        state = node.chunk_state
        if not node.is_last_layer:
            state.mtp_hidden_states.append(node.detach(hidden))
            return hidden
        parts, state.mtp_hidden_states = [*state.mtp_hidden_states, hidden], None
        return torch.cat(parts)

    return run


def with_layers(original: Callable[..., Any], replaced: Callable[[list[Any], Any], list[Any]]) -> Callable[..., Any]:
    """Megatron's ``mtp_block_spec`` with the specs of the transformer layers inside replaced.

    Args:
        original: Megatron's.
        replaced: from a stage's specs of such layers, and the model's configuration, to what they are built from.
    """

    def mtp_block_spec(config: Any, *args: Any, **kwargs: Any) -> Any:
        block = original(config, *args, **kwargs)
        if block is None:
            return None
        inner = replaced([spec.submodules.mtp_model_layer for spec in block.layer_specs], config)
        block, outer = copy(block), [copy(spec) for spec in block.layer_specs]
        for spec, layer in zip(outer, inner, strict=True):
            spec.submodules = copy(spec.submodules)
            spec.submodules.mtp_model_layer = layer
        block.layer_specs = outer
        return block

    return mtp_block_spec
