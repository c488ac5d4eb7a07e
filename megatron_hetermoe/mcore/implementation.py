"""Whose linear layers a model is made of, torch's or transformer-engine's.

Of the dense parts ``--transformer-impl`` says it, of experts ``--hetermoe-expert-impl``.

Experts have one implementation, whichever rank they are on, so a placement changes no number. It is no part of a
checkpoint: Megatron gives torch's layers transformer-engine's keys.
"""

from __future__ import annotations

import importlib.util
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.backends import get_backend
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hetermoe.config.plan import MERGED, Plan

LOCAL, ENGINE = "local", "transformer_engine"  # Megatron's names of them
_ENGINE_CAPABILITY = (8, 0)  # Ampere

# Kernels of dense parts that are transformer-engine's, which Megatron looks for on every rank.
_ENGINE_KERNELS = ("apply_rope_fusion", "moe_router_fusion", "te_rng_tracker")


def is_installed() -> bool:
    """Whether transformer-engine is there to be imported; it is not imported for that."""
    return importlib.util.find_spec(ENGINE) is not None


def engine_obstacle(capability: tuple[int, int] | None, installed: bool) -> str | None:
    """Why a rank cannot run transformer-engine's layers; None when it can.

    Args:
        capability: of its GPU; None for the CPU.
        installed: whether its machine has transformer-engine.
    """
    if capability is None:
        return "it has no GPU"
    if capability < _ENGINE_CAPABILITY:
        return (f"its GPU has compute capability {capability[0]}.{capability[1]}, transformer-engine is for "
                f"{_ENGINE_CAPABILITY[0]}.{_ENGINE_CAPABILITY[1]} and newer")
    return None if installed else "transformer-engine is not installed there"


def without_engine(args: Any) -> None:
    """Switches off, in Megatron's arguments, kernels of dense parts that this machine lacks: its ranks have none."""
    if args.transformer_impl == ENGINE and not is_installed():
        for name in _ENGINE_KERNELS:
            setattr(args, name, False)


def expert_obstacle(plan: Plan, activation_again: bool) -> str | None:
    """What of a run experts with transformer-engine's layers cannot do; None when there is nothing.

    Args:
        plan: the run's.
        activation_again: whether the output of experts' activation is computed again in the backward.
    """
    if plan.expert_kernel == "grouped":
        return "--hetermoe-experts grouped, which is for torch's"
    if activation_again:
        return "--recompute-modules moe_act"
    return "--hetermoe-weight-gradients merged" if plan.weight_gradients == MERGED else None


def choose_for_experts(
    plan: Plan, dense: str, activation_again: bool, able: bool, control: dist.ProcessGroup | None
) -> str:
    """The implementation of all experts: LOCAL or ENGINE.

    Args:
        plan: the run's; ``auto`` takes that of the dense parts, where all ranks with experts can.
        dense: ``--transformer-impl``.
        activation_again: as of ``expert_obstacle``.
        able: whether this rank can, or has no experts.
        control: gloo group over all ranks, which call it together where the answer depends on them; None for this one alone.
    """
    if plan.expert_impl != "auto":
        return plan.expert_impl
    if dense != ENGINE or expert_obstacle(plan, activation_again):
        return LOCAL
    everywhere = torch.tensor([int(able)])
    if control is not None:
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=control)
    return ENGINE if everywhere.item() else LOCAL


def expert_submodules(impl: str) -> MLPSubmodules:
    """The linear layers of one expert, LOCAL or ENGINE."""
    return get_backend(impl).grouped_mlp_modules(False).keywords["submodules"]


def expert_config(config: TransformerConfig, impl: str) -> TransformerConfig:
    """The model's configuration as it is for experts: without the kernels that their implementation lacks."""
    config = copy(config)
    if impl == LOCAL:
        config.use_te_activation_func = False
        config.gradient_accumulation_fusion &= layers._grad_accum_fusion_available  # apex'
    return config
