"""The model of an attention rank: Megatron's own, with only those experts that this rank holds."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import (
    TransformerLayerSchedulePlan,
    TransformerModelChunkSchedulePlan,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hetermoe.mcore import prediction, recompute
from megatron_hetermoe.mcore.dispatcher import AsymmetricDispatcher, DispatchState
from megatron_hetermoe.mcore.grouped import build_held
from megatron_hetermoe.mcore.session import Session


class AbsentExperts(MegatronModule):
    """Stands where a layer's experts would be on a rank that holds none of them."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)

    def backward_dw(self) -> None:
        """There are no weights."""


class RoutedMoELayer(MoELayer):
    """A mixture-of-experts layer's router and shared expert, with the routed experts that this rank holds.

    Args:
        config: the transformer's.
        submodules: of the stock layer.
        pg_collection: groups of the attention pool.
        session: this rank's.
        layer: from 1 on.
        seed: of the run.
        others: what else Megatron passes to a MoELayer.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MoESubmodules, pg_collection: ProcessGroupCollection,
        session: Session, layer: int, seed: int, **others: Any,
    ):
        def experts(num_local_experts: int, config: TransformerConfig, **kwargs: Any) -> MegatronModule:
            if not session.held(layer):
                return AbsentExperts(config)
            return build_held(config, session, layer, seed, pg_collection)

        # The stock constructor divides a layer's experts by the expert-parallel size; ours need not divide.
        alone = copy(pg_collection)
        alone.ep = pg_collection.expt_tp
        super().__init__(
            config,
            submodules=MoESubmodules(
                experts=experts, shared_experts=submodules.shared_experts, router=submodules.router
            ),
            pg_collection=alone,
            **others,
        )
        self.token_dispatcher = AsymmetricDispatcher(config, alone, session.placement, layer)


def route_to_holders(layer_specs: list[Any], layers: range, session: Session, seed: int) -> list[Any]:
    """Megatron's layer specs with every mixture-of-experts layer replaced by a RoutedMoELayer.

    Args:
        layer_specs: of transformer layers; one object may stand for several layers, so each is copied.
        layers: their numbers in the model, from 1 on.
        session: this rank's.
        seed: of the run.
    """
    routed = []
    for layer, spec in zip(layers, layer_specs, strict=True):
        submodules = moe_submodules(spec)
        if submodules is not None:
            spec = copy(spec)
            spec.submodules = copy(spec.submodules)
            spec.submodules.mlp = partial(
                RoutedMoELayer, submodules=submodules, session=session, layer=layer, seed=seed
            )
        routed.append(spec)
    return routed


def moe_submodules(spec: Any) -> MoESubmodules | None:
    """What a layer's spec builds its mixture of experts from, or None for a dense layer."""
    mlp = spec.submodules.mlp
    return mlp.keywords["submodules"] if getattr(mlp, "func", None) is MoELayer else None


class LayerTasks(TransformerLayerSchedulePlan):
    """Megatron's nodes of one layer for one microbatch, with that microbatch's dispatcher state.

    Of the nodes, A tasks walk ``pre_dispatch_computation`` and, at a layer's end, ``moe_combine`` or, where the layer
    is dense, ``mlp``. Of a layer that predicts a further token they are those of the transformer layer in it.
    """

    def __init__(self, layer: torch.nn.Module, *others: Any):
        self._predictor = layer if isinstance(layer, MultiTokenPredictionLayer) else None
        super().__init__(layer.mtp_model_layer if self._predictor else layer, *others)

    def _build_callable_nodes(self, event: Any, comp_stream: Any, comm_stream: Any, extra_args: dict) -> None:
        # Megatron ends a layer on its stream for communication; here transfers are no part of any node.
        super()._build_callable_nodes(event, comp_stream, comp_stream, extra_args)
        self.has_experts = isinstance(self.layer.mlp, MoELayer)
        attend = self.pre_dispatch_computation
        if self._predictor:
            attend.submodule = prediction.projecting(attend.submodule, self._predictor)
            self.end.is_mtp = True  # the decoder's final norm is not for it
        if self.has_experts:
            self.dispatch_state = DispatchState()
            self.attend = attend.submodule  # without this microbatch's state
            for node in (attend, self.moe_combine):
                node.submodule = _with_state(node.submodule, self.layer.mlp.token_dispatcher, self.dispatch_state)
        if self.layer.config.sequence_parallel:
            for node in (attend, self.end):
                node.submodule = _with_own_random_numbers(node.submodule)
        self._recompute()
        if self._predictor:
            attend.submodule = prediction.embedding_later(attend.submodule, self._predictor)
            self.end.submodule = prediction.predicting(self.end.submodule, self._predictor)
        elif not self.has_experts and extra_args.get("is_last_layer"):
            self.mlp.submodule = _with_final_norm(self.mlp.submodule)

    def _recompute(self) -> None:
        """Has nodes run again before their backward, as the flags ask."""
        attend, layer = self.pre_dispatch_computation, self.layer
        decoder = self.chunk_state.model.decoder.layers
        # Megatron counts from 1 anew in layers that predict further tokens, and not in a stage.
        number = layer.layer_number + (len(decoder) if self._predictor else 1 - decoder[0].layer_number)
        if recompute.whole_layer(layer.config, number):
            if self.has_experts:
                attend.submodule = recompute.rerun_routing(attend.submodule)
                self.moe_combine.submodule = recompute.free_residual(self.moe_combine.submodule)
            else:
                attend.submodule = recompute.rerun_simple(attend.submodule)
                self.mlp.submodule = recompute.rerun_simple(self.mlp.submodule)
        elif self.has_experts and layer.recompute_pre_mlp_layernorm:
            attend.submodule = recompute.recompute_norm(attend.submodule, layer)

    @property
    def end(self) -> Any:
        """The node that ends the layer."""
        return self.moe_combine if self.has_experts else self.mlp


def _with_state(submodule: Any, dispatcher: AsymmetricDispatcher, state: DispatchState) -> Any:
    def run(node: Any, *inputs: torch.Tensor) -> Any:
        with dispatcher.lent(state):
            return submodule(node, *inputs)

    return run


def _with_own_random_numbers(submodule: Any) -> Any:
    """TransformerBlock runs its layers so where ranks have parts of one sequence: each draws for its own part."""

    def run(node: Any, *inputs: torch.Tensor) -> Any:
        with get_cuda_rng_tracker().fork():
            return submodule(node, *inputs)

    return run


def _with_final_norm(submodule: Any) -> Any:
    """Megatron's nodes apply the block's final norm at the end of a last layer with experts only."""

    def run(node: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        output = submodule(node, hidden_states)
        final_norm = node.chunk_state.model.decoder.final_layernorm
        return output if final_norm is None else final_norm(output)

    return run


class ModelTasks(TransformerModelChunkSchedulePlan):
    """Megatron's nodes of the whole model for one microbatch."""

    LAYER_SCHEDULE_PLAN_CLASS = LayerTasks

    def layer(self, number: int) -> LayerTasks:
        """A layer's nodes, from 1 on."""
        return self.get_layer(number - 1)


class PlanningModel:
    """Stands for the model in a user's ``forward_step``: called like it, it makes the tasks in place of running them.

    Args:
        model: the attention rank's, without DDP's and precision's wrappers.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None,
        **inputs: Any,
    ) -> ModelTasks:
        """As ``GPTModel.forward``; inputs it does not know are refused by Megatron's plan."""
        return ModelTasks(self._model, input_ids, position_ids, attention_mask, **inputs)
