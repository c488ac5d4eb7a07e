"""One optimizer step over both pools: one gradient norm, one clip, one decision to skip, one loss scale."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler, MegatronGradScaler

from megatron_hetermoe.mcore.meter import Meter
from megatron_hetermoe.mcore.platform.wheel import initialise_adam
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.runtime.marks import Marks


class PooledOptimizer(ChainedOptimizer):
    """Megatron's optimizers of one pool, stepping as one with those of the other.

    Inside a pool Megatron's own reductions are right and end in the same number on every rank of it. What is left is
    one sum over the two pools, on the control group.

    Every rank chains the same two, one for dense and one for experts' parameters, since Megatron aligns parameter
    groups over the world; a rank may have no parameter in one of them.

    Args:
        chained: what Megatron built for this rank's pool.
        session: this rank's.
        marks: told what runs.
        meter: told when a training step ends.
    """

    def __init__(self, chained: ChainedOptimizer, session: Session, marks: Marks, meter: Meter):
        super().__init__(chained.chained_optimizers)
        self._marks = marks
        self._meter = meter
        self._session = session
        self._scaler = self._share_scaler()
        for optimizer in self.chained_optimizers:
            if isinstance(optimizer, DistributedOptimizer):
                initialise_adam(optimizer.optimizer)
                # Names this holder's part in the checkpoint; Megatron's index counts holders inside a pool only.
                if any(group["is_expert_parallel"] for group in optimizer.param_groups):
                    members = session.layout.m + session.layout.n
                    optimizer.data_parallel_group_idx = session.stage * members + session.member

    def _share_scaler(self) -> _AgreedScaler | None:
        """One loss scale for all optimizers of this rank, updated when all ranks have said what they found."""
        scaler = getattr(self.chained_optimizers[0], "grad_scaler", None)
        if scaler is None and self._session.plan.has_loss_scale:
            scaler = _dynamic_scaler(self.config)
        if scaler is None:
            return None
        agreed = _AgreedScaler(scaler)
        for optimizer in self.chained_optimizers:
            optimizer.grad_scaler = agreed
            optimizer.found_inf = torch.zeros(1, device=scaler.scale.device)  # which one without a scaler does not have
        return agreed

    def step(self) -> tuple[bool, float | None, int | None]:
        """As ChainedOptimizer's."""
        with self._marks.phase("the optimizer step"), self._meter.optimizer():
            result = super().step()
        self._meter.end_step()
        return result

    def prepare_grads(self) -> bool:
        """As ChainedOptimizer's; an overflow on any rank of either pool counts everywhere."""
        found = super().prepare_grads()
        if self._scaler is None:
            return found
        everywhere = torch.tensor([float(found)])
        dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=self._session.control)
        self._scaler.agree(everywhere.item() > 0)
        return everywhere.item() > 0

    def get_grad_norm(self) -> float:
        """The norm of all gradients of both pools."""
        return math.sqrt(self._session.over_pools(super().get_grad_norm() ** 2))

    def count_zeros(self) -> float:
        """The zeros in all gradients of both pools."""
        return self._session.over_pools(super().count_zeros())

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[int, Any]:
        """As ChainedOptimizer's, where a rank may have no parameter that an optimizer is for.

        What is not sharded is written by rank 0 alone, for all. It is an attention rank, so where it has no experts
        it must still write what their holders will read: the number of steps, which is the same everywhere.
        """
        self._marks.enter("a load" if is_loading else "a save")
        sharding = (kwargs.get("metadata") or {}).get("distrib_optim_sharding_type")
        reshardable = sharding in DistributedOptimizer.checkpoint_fully_reshardable_formats
        state = {}
        for index, optimizer in enumerate(self.chained_optimizers):
            distributed = isinstance(optimizer, DistributedOptimizer)
            if distributed and _is_idle(optimizer):
                state[index] = {"param_state_sharding_type": sharding}
                if reshardable:
                    state[index] |= _unsharded(optimizer)
                continue
            state[index] = optimizer.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
            if _is_idle(optimizer):
                # Lists of no tensors, which rank 0 would write for all, do not merge with those of holders.
                state[index].pop("fp32_from_fp16_params", None)
            if distributed and not reshardable:
                add_prefix_for_sharding(state[index], f"chained_{index}.")
        if reshardable:
            _share_steps([group for part in state.values() for group in part["optimizer"]["param_groups"]], "step")
        elif sharding is None:
            _share_steps([part.get("optimizer", part)["state"] for part in state.values()], "common_step")
        return state

    def load_state_dict(self, state_dict: dict[int, Any]) -> None:
        """As ChainedOptimizer's, past the optimizers that have no parameter here.

        Stock Megatron with one rank per expert group has one optimizer for all parameters, so that what is not sharded
        stands in its checkpoint beside what was read for each of ours, in place of inside.
        """
        common = {key: value for key, value in state_dict.items() if not isinstance(key, int)}
        for index, optimizer in enumerate(self.chained_optimizers):
            if not _is_idle(optimizer):
                state = state_dict[index]
                state = _with_common(state, common, optimizer) if common else state
                fit_to_adam(state, optimizer.optimizer, isinstance(optimizer, DistributedOptimizer))
                optimizer.load_state_dict(state)


class _AgreedScaler(MegatronGradScaler):
    """A loss scaler that updates once, when all ranks agree on whether there was an overflow.

    Megatron's optimizers update theirs as soon as their own group has looked, so scales would part.
    """

    def __init__(self, scaler: MegatronGradScaler):
        self._scaler = scaler

    @property
    def scale(self) -> torch.Tensor:
        return self._scaler.scale

    @property
    def inv_scale(self) -> torch.Tensor:
        return self._scaler.inv_scale

    def update(self, found_inf: bool) -> None:
        """An optimizer's own finding, which prepare_grads passes on."""

    def agree(self, found_inf: bool) -> None:
        """Updates the scale with what was found on any rank."""
        self._scaler.update(found_inf)

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state_dict)


def _dynamic_scaler(config: OptimizerConfig) -> DynamicGradScaler:
    """What Megatron makes for fp16, for a rank in bf16 whose loss flows through experts in fp16."""
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale, min_scale=config.min_loss_scale, growth_factor=2.0, backoff_factor=0.5,
        growth_interval=config.loss_scale_window, hysteresis=config.hysteresis,
    )


def scale_expert_gradients(model_chunks: list[Any], session: Session) -> None:
    """Makes DDP divide an expert's gradient by the number of copies of the dense part.

    The loss is the mean over them, and an expert's gradient sums what comes of all their tokens, whichever attention
    rank has sent them. DDP divides by the data-parallel size of its own pool, which on expert ranks is another number.
    """
    if session.is_attention or model_chunks[0].config.calculate_per_token_loss:
        return  # per-token loss: divided by the tokens of both pools, in finalize_model_grads
    factor = session.layout.expert_ranks / session.layout.stages / session.layout.replicas
    for chunk in model_chunks:
        for group in chunk.expert_parallel_bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor *= factor


def _is_idle(optimizer: Any) -> bool:
    """Whether an optimizer has no parameter of this rank, and so no state of its own."""
    if isinstance(optimizer, DistributedOptimizer):
        # A shard may be empty where the parameters that it is a part of are not.
        return not optimizer.model_param_gbuf_map
    return not optimizer.get_parameters()


def _with_common(state: dict[str, Any], common: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimizer's sharded state with what all optimizers have in common, as of the parameters that it is for."""
    whole = deepcopy(common)
    inner = whole.get("optimizer", whole)
    for group in inner["param_groups"]:
        group |= {"is_expert_parallel": any(own["is_expert_parallel"] for own in optimizer.param_groups), "params": []}
    read = state.get("optimizer", state)
    if "state" in read:
        inner["state"] = {**inner.get("state", {}), **read["state"]}
    if "param_groups" in read:  # the numbers of the parameters, which no checkpoint holds
        groups = optimizer._filter_and_reorder_param_groups(optimizer.param_groups, inner["param_groups"])
        inner["param_groups"] = [{**group, **own} for group, own in zip(groups, read["param_groups"], strict=True)]
    return whole | {key: value for key, value in state.items() if key not in ("optimizer", "state", "param_groups")}


def fit_to_adam(state: dict[str, Any], adam: torch.optim.Optimizer, distributed: bool) -> None:
    """Changes an optimizer's state that another implementation of Adam may have written into one that this rank's reads.

    What is not sharded is written by rank 0 for all, and only some ranks may have transformer-engine, whose Adam counts
    steps in its parameter groups. torch's counts them for each parameter, which in a checkpoint is one number beside the
    states; but a distributed optimizer has it in the groups too.

    Args:
        state: what an optimizer of Megatron's is about to load.
        adam: this rank's.
        distributed: whether the optimizer is.
    """
    inner = state.get("optimizer", state)
    groups, states = inner["param_groups"], inner.get("state", {})
    for group in groups:
        for name, value in adam.defaults.items():
            group.setdefault(name, value)
    step = next((group["step"] for group in groups if "step" in group), states.get("common_step"))
    if step is None:
        return
    if not isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
        states.pop("common_step", None)
        for group in groups:
            group["step"] = int(step)
    elif not distributed:
        states.setdefault("common_step", torch.tensor(float(step)))


def _unsharded(optimizer: DistributedOptimizer) -> dict[str, Any]:
    """What rank 0 writes, for all, of an optimizer that has no parameter there; its own state_dict wants a step."""
    groups = optimizer.optimizer.state_dict()["param_groups"]
    state: dict[str, Any] = {"optimizer": {"param_groups": [{**group, "params": []} for group in groups]}}
    if optimizer.grad_scaler:
        state["grad_scaler"] = optimizer.grad_scaler.state_dict()
    return state


def _share_steps(states: list[dict[Any, Any]], name: str) -> None:
    """Writes the common step, under its name, to the states that have none for want of parameters."""
    steps = [state[name] for state in states if name in state]
    if steps:
        for state in states:
            state.setdefault(name, steps[0])
