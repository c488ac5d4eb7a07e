"""Recomputation of whole tasks: a task keeps its inputs only, and runs again just before its backward.

Megatron recomputes layers in ``TransformerBlock.forward``, which the nodes of a schedule plan go around; so what
``--recompute-granularity full`` asks for is done here, by Megatron's own ``tensor_parallel.checkpoint`` around the
nodes' functions. It restores the random state, and since a node's first run is then without gradients, what a router
counts (losses for the log, tokens for the expert bias) it counts in the second run only. Nothing is sent a second time:
transfers are no part of a node.

What ends a layer of experts is not run again. It keeps which row belongs to which token and, with dropout, a mask; what
it would need to run again is the experts' outputs, topk times larger than the layer's input.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig

# What Megatron recomputes inside of what nodes call, and what is added here: "moe" runs the experts again, "moe_act" what
# is between their products (mcore.activation).
SELECTIVE = frozenset({"core_attn", "layernorm", "mlp", "shared_experts", "moe", "moe_act", "mla_up_proj"})

Submodule = Callable[..., Any]  # of one of Megatron's nodes: called with the node and its inputs


def whole_layer(config: TransformerConfig, layer: int) -> bool:
    """Whether all of a layer's tasks are to run again, for a layer from 1 on in its pipeline stage.

    ``block`` recomputes the first layers of a stage. ``uniform`` recomputes all; Megatron then keeps the input of every so
    many layers, which tasks cannot: what a layer receives from its experts would have to be sent again.
    """
    if config.recompute_granularity != "full":
        return False
    return config.recompute_method == "uniform" or layer <= config.recompute_num_layers


def experts_again(config: TransformerConfig, layer: int) -> bool:
    """Whether the E tasks of a layer, from 1 on in its stage, are to run again."""
    selected = config.recompute_granularity == "selective" and "moe" in config.recompute_modules
    return selected or whole_layer(config, layer)


def rerun(function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """``function`` of tensors, keeping its inputs and nothing else for the backward."""
    return tensor_parallel.checkpoint(function, False, *inputs)


def rerun_simple(submodule: Submodule) -> Submodule:
    """A node's function that leaves nothing on its node, run again before its backward."""
    return lambda node, *inputs: rerun(lambda *again: submodule(node, *again), *inputs)


def rerun_routing(submodule: Submodule) -> Submodule:
    """The function of ``pre_dispatch_computation`` in a layer with experts, run again before its backward.

    It also leaves, for the node that ends the layer, the residual [s, b, h] and the shared expert's output on the
    node's layer state, detached from its graph. Detaching has to stay outside of what runs again, so that their
    gradients reach the second run.
    """

    def run(node: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def attend_and_route(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            left = SimpleNamespace()
            seen = SimpleNamespace(chunk_state=node.chunk_state, layer_state=left, detach=lambda tensor: tensor)
            tokens, probs = submodule(seen, *inputs)
            shared = getattr(left, "shared_expert_output", None)
            return (tokens, probs, left.residual) if shared is None else (tokens, probs, left.residual, shared)

        tokens, probs, residual, *shared = rerun(attend_and_route, *inputs)
        node.layer_state.residual = node.detach(residual)
        if shared:
            node.layer_state.shared_expert_output = node.detach(shared[0])
        return tokens, probs

    return run


def free_residual(submodule: Submodule) -> Submodule:
    """The end of a layer whose routing runs again: frees what only its own first run reads, [s, b, h] each.

    Adding a tensor needs no value of it for the backward.
    """

    def run(node: Any, outputs: torch.Tensor) -> torch.Tensor:
        added = [node.layer_state.residual, getattr(node.layer_state, "shared_expert_output", None)]
        result = submodule(node, outputs)
        for tensor in added:
            if tensor is not None:
                tensor.untyped_storage().resize_(0)
        return result

    return run


def recompute_norm(submodule: Submodule, layer: torch.nn.Module) -> Submodule:
    """``pre_dispatch_computation`` where ``layernorm`` is recomputed: frees the output of the norm before the router.

    Megatron has the experts' output start the second run of that norm. The node that makes it is not used here, so
    whatever leaves this node starts it: each one's backward may be the first that reads the norm's output.
    """

    def run(node: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, probs = submodule(node, *inputs)
        checkpoint, layer.pre_mlp_norm_checkpoint = layer.pre_mlp_norm_checkpoint, None
        if torch.is_grad_enabled():
            for tensor in (tokens, probs, *node.before_detached):
                checkpoint.discard_output_and_register_recompute(tensor)
        return tokens, probs

    return run
