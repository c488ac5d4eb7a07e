"""The experts of a holder, and the model of an expert rank, which is nothing but those."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_hetermoe.mcore.activation import expert_again
from megatron_hetermoe.mcore.initial import draw

_NOTHING = "no experts"  # in the state of a rank that holds none


class HeldExperts(SequentialMLP):
    """Megatron's experts, for a holder of any of a layer's experts.

    Three things differ from the stock module, which takes it that every rank of an expert-parallel group has the same
    number, in blocks: initial weights depend on layer and expert alone, so that a placement does not change
    training; parameters are marked as experts' whatever the size of the group; and the checkpoint has each expert
    under its index in the layer.

    Args:
        config: as for SequentialMLP.
        submodules: linear layers and activation of one expert.
        layer: from 1 on.
        held: the experts, ascending; at least one.
        seed: of the run.
        pg_collection: groups of this rank's pool.
        activation_again: whether the activation's output is computed again in the backward.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, layer: int, held: Sequence[int], seed: int,
        pg_collection: ProcessGroupCollection, activation_again: bool = False,
    ):
        uninitialised = copy(config)
        uninitialised.perform_initialization = False
        super().__init__(len(held), uninitialised, submodules, pg_collection)
        self.layer, self.held = layer, tuple(held)
        self.dtype = config.params_dtype
        self.activation_again = activation_again
        for module in self.local_experts if activation_again else ():
            module.forward = partial(expert_again, module)
        # For each group of rows that forward takes, its expert's position among those held.
        self.row_order = tuple(range(len(held)))
        for expert, module in zip(self.held, self.local_experts):
            if config.perform_initialization:
                _initialise(
                    module, config, (seed * 100_003 + layer) * 100_003 + expert, self.tp_group.rank(),
                    self.tp_group.size(),
                )
        for parameter in self.parameters():
            # What makes DDP and the optimizer treat a parameter as an expert's (its gradient is reduced over the
            # ranks that are the same holder); Megatron sets it only where the expert-parallel size is above 1.
            parameter.allreduce = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
        """As Module's, but a precision stays: what surrounds experts may be converted to another one."""
        return super()._apply(lambda tensor: tensor if (moved := fn(tensor)).dtype != tensor.dtype else moved, recurse)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As SequentialMLP's, with each expert at its own index of all experts of the layer."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded = {}
        for local, (expert, module) in enumerate(zip(self.held, self.local_experts)):
            local_prefix = f"{prefix}local_experts.{local}."
            if metadata.get("singleton_local_shards", False):
                key_prefix, offsets = f"{prefix}experts.{expert}.", sharded_offsets
            else:
                position = (len(sharded_offsets), expert, self.config.num_moe_experts)
                key_prefix, offsets = f"{prefix}experts.", (*sharded_offsets, position)
            state = module.sharded_state_dict(local_prefix, offsets, metadata)
            replace_prefix_for_sharding(state, local_prefix, key_prefix)
            for tensor in state.values():
                # A replica is the same holder of another ZP group.
                tensor.replica_id = (*tensor.replica_id[:2], self.dp_group.rank())
            sharded.update(state)
        return sharded


def _initialise(
    expert: torch.nn.Module, config: TransformerConfig, seed: int, place: int, parts: int
) -> None:
    """Draws one expert's weights from a stream of their own, and leaves all other streams where they were.

    Of an expert that several ranks share, each draws the whole and keeps its part, the ``place``-th of ``parts``.
    """
    devices = [expert.linear_fc1.weight.device] if expert.linear_fc1.weight.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed % 2**63)
        for weight, initialise, split, matrices in (
            (expert.linear_fc1.weight, config.init_method, 0, 2 if config.gated_linear_unit else 1),
            (expert.linear_fc2.weight, config.output_layer_init_method, 1, 1),
        ):
            if parts == 1:
                draw(weight, initialise)
                continue
            shape = list(weight.shape)
            shape[split] *= parts
            whole = weight.new_empty(shape)
            draw(whole, initialise)
            # A gate stands beside what it gates in one weight, and each of the two is split.
            own = [matrix.chunk(parts, split)[place] for matrix in whole.chunk(matrices, split)]
            weight.copy_(torch.cat(own, split))


class ExpertModel(MegatronModule):
    """All that an expert rank builds: its experts, under the names that they have in the whole model.

    Args:
        config: the transformer's.
        decoder_layers, mtp_layers: of this rank's pipeline stage, from 1 on; the latter predict further tokens.
        held: the experts that this rank holds, by layer.
        pg_collection: groups of the expert pool.
    """

    def __init__(
        self, config: TransformerConfig, decoder_layers: range, mtp_layers: range, held: dict[int, HeldExperts],
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config)
        self.pg_collection = pg_collection
        # What megatron.training asks of any model.
        self.pre_process = self.post_process = self.share_embeddings_and_output_weights = False
        self.vp_stage = None
        self._first = decoder_layers.start
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(_layer_of(held.get(layer)) for layer in decoder_layers)
        if mtp_layers:
            self.mtp = torch.nn.Module()
            self.mtp.layers = torch.nn.ModuleList()
            for layer in mtp_layers:
                predictor = torch.nn.Module()
                predictor.mtp_model_layer = _layer_of(held.get(layer))
                self.mtp.layers.append(predictor)

    def shared_embedding_or_output_weight(self) -> None:
        """Expert ranks have no embedding."""

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Pipeline schedules set the stage's input; an expert rank's comes over its channel."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The experts under the keys that Megatron's own model gives them (TransformerBlock.sharded_state_dict)."""
        by_layer = _layers_in_keys(self.config, metadata)
        sharded = {}

        def add(layer: torch.nn.Module, layer_prefix: str, key_prefix: str, offsets: tuple) -> None:
            if hasattr(layer.mlp, "experts"):
                state = layer.mlp.experts.sharded_state_dict(f"{layer_prefix}mlp.experts.", offsets, metadata)
                replace_prefix_for_sharding(state, layer_prefix, key_prefix)
                sharded.update(state)

        for index, layer in enumerate(self.decoder.layers):
            number = index + self._first - 1
            of_layer, offsets = (f"{number}.", ()) if by_layer else ("", ((0, number, self.config.num_layers),))
            add(layer, f"{prefix}decoder.layers.{index}.", f"{prefix}decoder.layers.{of_layer}", offsets)
        for index, layer in enumerate(self.mtp.layers if hasattr(self, "mtp") else ()):
            # A name that Megatron keeps for checkpoints (MultiTokenPredictionLayer.sharded_state_dict).
            add(layer.mtp_model_layer, f"{prefix}mtp.layers.{index}.mtp_model_layer.",
                f"{prefix}mtp.layers.{index}.transformer_layer.", ())
        # Megatron reads a model's part of what it loaded, and what is empty is not there.
        return sharded or {f"{prefix}{_NOTHING}": LocalNonpersistentObject(None)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's."""
        return super().load_state_dict({name: value for name, value in state_dict.items() if name != _NOTHING}, strict, assign)


def _layer_of(experts: HeldExperts | None) -> torch.nn.Module:
    """What stands for a transformer layer on an expert rank."""
    layer = torch.nn.Module()
    layer.mlp = torch.nn.Module()
    if experts is not None:
        layer.mlp.experts = experts
    return layer


def experts_of(model: torch.nn.Module, layer: int) -> HeldExperts:
    """The experts that a rank holds of a layer, from 1 on in its stage; ``model`` is an attention or an expert rank's."""
    decoder = model.decoder.layers
    inside = decoder[layer - 1] if layer <= len(decoder) else model.mtp.layers[layer - len(decoder) - 1].mtp_model_layer
    return inside.mlp.experts


def _layers_in_keys(config: TransformerConfig, metadata: dict | None) -> bool:
    """Whether Megatron names layers in the keys, since they differ, in place of stacking them along an axis."""
    metadata = metadata or {}
    frequencies = (config.moe_layer_freq, getattr(config, "linear_attention_freq", None))
    return bool(
        metadata.get("non_homogeneous_layers")
        or metadata.get("singleton_local_shards")
        or config.hetereogenous_dist_checkpoint
        or config.heterogeneous_block_specs
        or any(isinstance(frequency, list) or (frequency or 1) > 1 for frequency in frequencies)
    )
