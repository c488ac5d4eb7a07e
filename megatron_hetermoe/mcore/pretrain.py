"""A disaggregated run: from a command line to Megatron's own training loop."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.global_vars import set_global_variables
from megatron.training.models.gpt import GPTModelBuilder, default_layer_spec

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import STALL_TIMEOUT, Flags
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.slow_down import parse_slow_down
from megatron_hetermoe.mcore import dry_run, gpt, patches
from megatron_hetermoe.mcore.attention import moe_submodules, route_to_holders
from megatron_hetermoe.mcore.checkpoints import check_load, going_on, sealing
from megatron_hetermoe.mcore.experts import ExpertModel
from megatron_hetermoe.mcore.forward_backward import ForwardBackward
from megatron_hetermoe.mcore.grouped import build_held
from megatron_hetermoe.mcore.meeting import join_world, meet
from megatron_hetermoe.mcore.meter import Meter
from megatron_hetermoe.mcore.optimizer import PooledOptimizer, scale_expert_gradients
from megatron_hetermoe.mcore.platform.wheel import with_step, without_makefile
from megatron_hetermoe.mcore.pools import join_pools
from megatron_hetermoe.mcore.sdpa import choose_kernel, with_kernel
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.mcore.trust import SWITCH, load_weights_only
from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.runtime.recorder import Recorder
from megatron_hetermoe.runtime.watch import Watch
from megatron_hetermoe.runtime.watched import watched
from megatron_hetermoe.schedule.tasks import Kind
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT, layout_of


def run(args: argparse.Namespace, plan: Plan, flags: Flags) -> None:
    """Trains. All ranks of both pools call it, with the same plan.

    Args:
        args: Megatron's, validated for this plan.
        plan: the run's.
        flags: the ``--hetermoe`` ones, for what is no part of a plan.
    """
    patches.check()
    if flags.dry_run:
        dry_run.prepare(args)
    layout = layout_of(plan)
    store, store_rank = meet(args, plan, layout)
    set_global_variables(args)
    with watched(
        args.rank, [layout.role(rank) for rank in range(layout.world_size)], flags.stall_timeout or STALL_TIMEOUT,
        store_rank,
    ) as watch:
        _train(args, plan, flags, store, watch)


def _train(args: argparse.Namespace, plan: Plan, flags: Flags, store: dist.Store, watch: Watch) -> None:
    join_world(args, store)
    session = join_pools(plan)
    if not session.is_attention:
        # Experts draw no random numbers, and a stock checkpoint has a state for ranks with attention only.
        args.no_save_rng = args.no_load_rng = True
    announce(session)
    measurements = dry_run.Measurements() if flags.dry_run else None
    recorder = None
    if flags.trace:
        recorder = Recorder(Path(flags.trace), session.rank, session.device)
        if session.rank == 0:
            Path(flags.trace, "plan.json").write_text(plan.to_json(), encoding="utf-8")
    patches.apply(_replacements(session, flags, Meter(session, recorder), measurements, watch.marks))
    watch.marks.enter("the check of the checkpoint")
    if not load_weights_only() and session.rank == 0:
        print(f"hetermoe: warning: {SWITCH} is off: a checkpoint may run a program as it is loaded", flush=True)
    check_load(args, session)
    watch.marks.enter("start-up")
    config = pretrain_cfg_container_from_args(args, None)
    provider = partial(gpt.datasets_provider, is_built_on_rank=lambda: session.is_attention and gpt.reads_data())
    provider.is_distributed = True
    train = partial(
        pretrain, config, provider, ModelType.encoder_or_decoder, gpt.forward_step,
        model_provider=model_provider(args, session),
    )
    if measurements:
        dry_run.run(train, session, measurements)
    else:
        train()
    # A rank that leaves early takes down those that still talk to it.
    watch.marks.enter("the end of all ranks")
    dist.barrier()
    dist.destroy_process_group()


def slow_down(flags: Flags, session: Session) -> dict[Kind, float]:
    """How many times as long this rank's tasks are to take, by kind."""
    if flags.slow_down is None:
        return {}
    factors = parse_slow_down(flags.slow_down, Problems())
    if session.rank == 0 and factors[ATTENTION, EXPERT] != factors[EXPERT, EXPERT]:
        print("hetermoe: --hetermoe-slow-down: expert ranks have no attention tasks, so what it says of these changes "
              "nothing", flush=True)
    return {kind: factors[name, session.role] for kind, name in ((Kind.ATTENTION, ATTENTION), (Kind.EXPERT, EXPERT))}


def announce(session: Session) -> None:
    """Prints, on the first rank, one line that says as JSON what runs where."""
    if session.rank:
        return
    layout, plan = session.layout, session.plan
    ranks = [
        {
            "rank": rank, "role": layout.role(rank), "group": layout.group_of(rank),
            "experts": session.placement.experts_held(layout.holder_of(rank)),
        }
        for rank in range(layout.world_size)
    ]
    print("hetermoe plan: " + json.dumps({"schedule": plan.schedule, "wave": plan.wave, "ranks": ranks}), flush=True)


def model_provider(args: argparse.Namespace, session: Session) -> Callable[..., Any]:
    """What builds this rank's part of the model, in Megatron's form of a provider."""

    def provide(
        pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, config: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> Any:
        model_config = gpt_config_from_args(args, config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        spec = default_layer_spec(model_config, vp_stage)
        if session.is_attention:
            is_gpu = torch.empty(0, device=session.device).is_cuda
            kernel = choose_kernel(session.plan.attention_kernel, model_config.transformer.params_dtype, is_gpu)
            spec.layer_specs = with_kernel(route_to_holders(spec.layer_specs, session, args.seed), kernel)
            model_config.transformer_layer_spec = spec
            return GPTModelBuilder(model_config).build_model(groups, pre_process, post_process, vp_stage)
        config = _of_expert_pool(model_config.transformer, session.plan)
        held = {
            layer: build_held(submodules.experts, config, session, layer, args.seed, groups)
            for layer, layer_spec in enumerate(spec.layer_specs, start=1)
            if (submodules := moe_submodules(layer_spec)) is not None and session.held(layer)
        }
        return ExpertModel(config, held, groups)

    return provide


def _of_expert_pool(config: TransformerConfig, plan: Plan) -> TransformerConfig:
    """The model's configuration as it is on expert ranks, which have a tensor parallelism of their own."""
    config = copy(config)
    config.tensor_model_parallel_size, config.sequence_parallel = 1, False
    config.expert_tensor_parallel_size = plan.expert_tensor_parallel
    return config


def _replacements(
    session: Session, flags: Flags, meter: Meter, measurements: dry_run.Measurements | None, marks: Marks
) -> dict[str, Callable[[Any], Any]]:
    """What each patch of the inventory puts in place of the original."""
    forward_backward = ForwardBackward(
        session, marks, meter, measurements, slow_down(flags, session), flags.self_check
    )

    def schedule(original: Any) -> Any:
        return lambda *args, **kwargs: forward_backward

    def optimizer(original: Any) -> Any:
        def get_megatron_optimizer(config: Any, model_chunks: list[Any], *args: Any, **kwargs: Any) -> Any:
            scale_expert_gradients(model_chunks, session)
            return PooledOptimizer(original(config, model_chunks, *args, **kwargs), session, marks, meter)

        return get_megatron_optimizer

    def params_norm(original: Any) -> Any:
        def calc_params_l2_norm(*args: Any, **kwargs: Any) -> float:
            return math.sqrt(session.over_pools(original(*args, **kwargs) ** 2))

        return calc_params_l2_norm

    def save(original: Any) -> Any:
        return sealing(original, session)

    def save_checkpoint(original: Any) -> Any:
        return going_on(original, session) if flags.on_save_failure == "continue" else original

    training = "megatron.training.training"
    distributed = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    return {
        f"{training}.get_forward_backward_func": schedule,
        f"{training}.get_megatron_optimizer": optimizer,
        f"{training}.calc_params_l2_norm": params_norm,
        f"{distributed}._set_main_param_and_optimizer_states": with_step,
        "megatron.core.datasets.utils.compile_helpers": without_makefile,
        "megatron.core.dist_checkpointing.save": save,
        f"{training}.save_checkpoint": save_checkpoint,
    }
