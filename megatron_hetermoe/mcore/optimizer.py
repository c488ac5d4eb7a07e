"""One optimizer step over both pools: one gradient norm, one clip, one decision to skip, one loss scale."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import MegatronGradScaler

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
    """

    def __init__(self, chained: ChainedOptimizer, session: Session, marks: Marks):
        super().__init__(chained.chained_optimizers)
        self._marks = marks
        self._session = session
        self._scaler = self._share_scaler()
        for optimizer in self.chained_optimizers:
            if isinstance(optimizer, DistributedOptimizer):
                _initialise_adam(optimizer.optimizer)
                # Names this holder's part in the checkpoint; Megatron's index counts holders inside a pool only.
                if any(group["is_expert_parallel"] for group in optimizer.param_groups):
                    optimizer.data_parallel_group_idx = session.member

    def _share_scaler(self) -> "_AgreedScaler | None":
        """One loss scale for all optimizers of this rank, updated when all ranks have said what they found."""
        scalers = [getattr(optimizer, "grad_scaler", None) for optimizer in self.chained_optimizers]
        if not any(scalers):
            return None
        agreed = _AgreedScaler(scalers[0])
        for optimizer in self.chained_optimizers:
            optimizer.grad_scaler = agreed
        return agreed

    def step(self) -> tuple[bool, float | None, int | None]:
        """As ChainedOptimizer's."""
        with self._marks.phase("the optimizer step"):
            return super().step()

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
        return math.sqrt(self._over_pools(super().get_grad_norm() ** 2))

    def count_zeros(self) -> float:
        """The zeros in all gradients of both pools."""
        return self._over_pools(super().count_zeros())

    def _over_pools(self, value: float) -> float:
        """The sum of both pools' values; each pool's first rank speaks for it."""
        pool = self._session.layout.pool(self._session.role)
        total = torch.tensor([float(value) if self._session.rank == pool[0] else 0.0], dtype=torch.float64)
        dist.all_reduce(total, group=self._session.control)
        return total.item()

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[int, Any]:
        """As ChainedOptimizer's, where a rank may have no parameter that an optimizer is for.

        What is not sharded is written by rank 0 alone, for all. It is an attention rank, so where it has no experts
        it must still write what their holders will read: the number of steps, which is the same everywhere.
        """
        self._marks.enter("a load" if is_loading else "a save")
        state, unsharded = {}, []
        for index, optimizer in enumerate(self.chained_optimizers):
            if _is_idle(optimizer) and isinstance(optimizer, DistributedOptimizer):
                state[index] = {"param_state_sharding_type": kwargs["metadata"]["distrib_optim_sharding_type"]}
                continue
            state[index] = optimizer.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
            if isinstance(optimizer, DistributedOptimizer):
                add_prefix_for_sharding(state[index], f"chained_{index}.")
            else:
                unsharded.append(state[index].get("optimizer", state[index])["state"])
        _share_steps(unsharded)
        return state

    def load_state_dict(self, state_dict: dict[int, Any]) -> None:
        """As ChainedOptimizer's, past the optimizers that have no parameter here."""
        for index, optimizer in enumerate(self.chained_optimizers):
            if not _is_idle(optimizer):
                optimizer.load_state_dict(state_dict[index])


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


def scale_expert_gradients(model_chunks: list[Any], session: Session) -> None:
    """Makes DDP divide an expert's gradient by the number of attention ranks.

    Every token of the global batch belongs to one of them, and the loss is the mean over them. DDP divides by the
    size of its own pool, which on expert ranks is another number.
    """
    if session.is_attention or model_chunks[0].config.calculate_per_token_loss:
        return  # per-token loss: divided by the tokens of both pools, in finalize_model_grads
    factor = session.layout.expert_ranks / session.layout.attention_ranks
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


def _initialise_adam(optimizer: torch.optim.Optimizer) -> None:
    """Gives torch's Adam the state that its first step would, since DistributedOptimizer reads a step before it."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)


def _share_steps(states: list[dict[Any, Any]]) -> None:
    """Writes the common step of optimizers that have one to those that, without parameters, have none."""
    steps = [state["common_step"] for state in states if "common_step" in state]
    if steps:
        for state in states:
            state.setdefault("common_step", steps[0])

