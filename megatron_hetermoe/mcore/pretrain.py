"""A disaggregated run: from a command line to Megatron's own training loop."""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.config import PretrainConfigContainer
from megatron.training.global_vars import set_global_variables
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import STALL_TIMEOUT, Flags
from megatron_hetermoe.config.log_lines import PLAN
from megatron_hetermoe.config.plan import DELAYED, Plan
from megatron_hetermoe.config.slow_down import parse_slow_down
from megatron_hetermoe.mcore import dry_run, gpt, patches, prediction
from megatron_hetermoe.mcore.arguments import set_precision
from megatron_hetermoe.mcore.attention import route_to_holders
from megatron_hetermoe.mcore.checkpoints import check_load, going_on, sealing
from megatron_hetermoe.mcore.devices import capability_of
from megatron_hetermoe.mcore.experts import ExpertModel
from megatron_hetermoe.mcore.forward_backward import ForwardBackward
from megatron_hetermoe.mcore.graphs import AttentionGraphs
from megatron_hetermoe.mcore.grouped import build_held
from megatron_hetermoe.mcore.implementation import ENGINE, choose_for_experts, engine_obstacle, is_installed
from megatron_hetermoe.mcore.initial import agree, draw_alike
from megatron_hetermoe.mcore.meeting import join_world, meet
from megatron_hetermoe.mcore.meter import Meter
from megatron_hetermoe.mcore.optimizer import PooledOptimizer, scale_expert_gradients
from megatron_hetermoe.mcore.platform.wheel import with_step, without_makefile
from megatron_hetermoe.mcore.pools import join_pools
from megatron_hetermoe.mcore.sdpa import choose_kernel, with_kernel
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.mcore.trust import SWITCH, load_weights_only
from megatron_hetermoe.mcore.weights import splitting
from megatron_hetermoe.runtime.device import is_gpu
from megatron_hetermoe.runtime.graphs import graphs_for
from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.runtime.recorder import Recorder
from megatron_hetermoe.runtime.watch import Watch
from megatron_hetermoe.runtime.watched import watched
from megatron_hetermoe.schedule.tasks import Kind
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT, layout_of


@dataclass(frozen=True)
class Script:
    """What a training script hands to ``megatron.training.pretrain``.

    Attributes:
        config: all of Megatron's configuration, the model's in it.
        datasets_provider: from numbers of samples to the training, validation and test sets.
        forward_step: runs one microbatch, and gives the function that makes its loss.
        model_type: one of Megatron's.
    """

    config: PretrainConfigContainer
    datasets_provider: Callable[..., Any] = gpt.datasets_provider
    forward_step: Callable[..., Any] = gpt.forward_step
    model_type: ModelType = ModelType.encoder_or_decoder


def run(args: argparse.Namespace, plan: Plan, flags: Flags) -> None:
    """Trains with this package's own data and forward step; otherwise as ``run_script``."""
    met = begin(args, plan, flags)
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    run_script(args, plan, flags, Script(config), met)


@dataclass(frozen=True)
class Met:
    """Where the processes have met.

    Attributes:
        store: the run's.
        host: the rank whose process has it; None where it is the launcher's.
    """

    store: dist.Store
    host: int | None


def begin(args: argparse.Namespace, plan: Plan, flags: Flags) -> Met:
    """Ranks meet, and Megatron gets its arguments: they say which rank this is, so nothing may read them before.

    Args:
        args: Megatron's, validated for this plan.
        plan: the run's.
        flags: the ``--hetermoe`` ones.
    """
    if flags.dry_run:
        dry_run.prepare(args)
    store, host = meet(args, plan, layout_of(plan))
    set_precision(args, plan)
    set_global_variables(args)
    return Met(store, host)


def run_script(args: argparse.Namespace, plan: Plan, flags: Flags, script: Script, met: Met) -> None:
    """Trains. All ranks of both pools call it, with the same plan.

    Args:
        args: Megatron's global ones.
        plan: the run's.
        flags: the ``--hetermoe`` ones, for what is no part of a plan.
        script: what to train with.
        met: by ``begin``.
    """
    patches.check(patches.RUN)
    layout = layout_of(plan)
    with watched(
        args.rank, [layout.role(rank) for rank in range(layout.world_size)], flags.stall_timeout or STALL_TIMEOUT,
        met.host,
    ) as watch:
        _train(args, plan, flags, script, met.store, watch)


def _train(
    args: argparse.Namespace, plan: Plan, flags: Flags, script: Script, store: dist.Store, watch: Watch
) -> None:
    join_world(args, store)
    session = _session(args, plan)
    if not session.is_attention:
        # Experts draw no random numbers, and a stock checkpoint has a state for ranks with attention only.
        args.no_save_rng = args.no_load_rng = True
        script.config.checkpoint.save_rng = script.config.checkpoint.load_rng = False
    announce(session)
    measurements = dry_run.Measurements() if flags.dry_run else None
    recorder = None
    if flags.trace:
        recorder = Recorder(Path(flags.trace), session.rank, session.device, session.numbering)
        if session.rank == 0:
            Path(flags.trace, "plan.json").write_text(plan.to_json(), encoding="utf-8")
    replacements = _replacements(session, flags, args.seed, Meter(session, recorder), measurements, watch.marks)
    patches.apply(patches.RUN, replacements)
    watch.marks.enter("the check of the checkpoint")
    if not load_weights_only() and session.rank == 0:
        print(f"hetermoe: warning: {SWITCH} is off: a checkpoint may run a program as it is loaded", flush=True)
    check_load(args, session)
    watch.marks.enter("start-up")
    if plan.weight_gradients == DELAYED and ENGINE in (args.transformer_impl, session.expert_impl):
        for config in (args, script.config.ddp, script.config.model.transformer):
            splitting(config)
    model, script.config.model = script.config.model, None  # Megatron then asks a function for the model
    train = functools.partial(
        pretrain, script.config, _datasets_provider(script.datasets_provider, session), script.model_type,
        script.forward_step, model_provider=model_provider(model, args.seed, session),
    )
    if measurements:
        dry_run.run(train, session, measurements)
    else:
        train()
    # A rank that leaves early takes down those that still talk to it.
    watch.marks.enter("the end of all ranks")
    dist.barrier()
    dist.destroy_process_group()


def _session(args: argparse.Namespace, plan: Plan) -> Session:
    """This rank's, with what all ranks have to agree on of their devices."""
    session = join_pools(plan, args.distributed_timeout_minutes)
    able = not session.holds or engine_obstacle(capability_of(session.device), is_installed()) is None
    impl = choose_for_experts(plan, args.transformer_impl, args.activation_again, able, session.control)
    return replace(session, activation_again=args.activation_again, expert_impl=impl,
                   draws_alike=draw_alike(session.device, session.control))


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
            "rank": rank, "role": layout.role(rank), "group": layout.group_of(rank) % layout.groups,
            **({"stage": layout.stage_of(rank)} if layout.stages > 1 else {}),
            "experts": session.placement.of_chunks(plan.chunks_of_stage(layout.stage_of(rank))).experts_held(
                layout.holder_of(rank)),
        }
        for rank in range(layout.world_size)
    ]
    print(PLAN + json.dumps(
        {"schedule": plan.schedule, "wave": plan.wave, "expert_impl": session.expert_impl, "ranks": ranks}), flush=True)


def _datasets_provider(provider: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """A script's provider of data sets, which on an expert rank builds none.

    Expert ranks call it too, for Megatron's builder has barriers of the world. They are told that they are not the
    first of their tensor-parallel ranks: by that a provider knows who reads the data.
    """

    @functools.wraps(provider)
    def provide(*args: Any, **kwargs: Any) -> Any:
        if session.is_attention:
            return provider(*args, **kwargs)
        mpu.set_tensor_model_parallel_rank(1)
        try:
            return provider(*args, **kwargs)
        finally:
            mpu.set_tensor_model_parallel_rank(None)

    return provide


def model_provider(model_config: GPTModelConfig, seed: int, session: Session) -> Callable[..., Any]:
    """What builds this rank's part of the model, in Megatron's form of a provider.

    Args:
        model_config: the script's.
        seed: of the run.
        session: this rank's.
    """

    def provide(
        pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, config: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> Any:
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        if session.is_attention:
            spec = default_layer_spec(model_config, vp_stage)
            spec.layer_specs = attention_specs(
                spec.layer_specs, session.decoder_layers(vp_stage or 0), model_config, seed, session)
            model_config.transformer_layer_spec = spec
            model = GPTModelBuilder(model_config).build_model(groups, pre_process, post_process, vp_stage)
        else:
            model = experts(vp_stage or 0, groups)
        if not session.draws_alike:
            agree(model, groups)
        return model

    def experts(chunk: int, groups: ProcessGroupCollection) -> ExpertModel:
        config = _of_expert_pool(model_config.transformer, session.plan)
        held = {
            layer: build_held(config, session, layer, seed, groups)
            for layer in session.chunks[chunk] if session.held(layer)
        }
        return ExpertModel(config, session.decoder_layers(chunk), session.mtp_layers(chunk), held, groups)

    return provide


def attention_specs(
    layer_specs: list[Any], layers: range, model_config: GPTModelConfig, seed: int, session: Session
) -> list[Any]:
    """What transformer layers are built from on an attention rank.

    Args:
        layer_specs: Megatron's.
        layers: their numbers in the model, from 1 on.
        model_config, seed, session: as for ``model_provider``.
    """
    kernel = choose_kernel(session.plan.attention_kernel, model_config.transformer.params_dtype, is_gpu(session.device),
                           session.layout.context)
    return with_kernel(route_to_holders(layer_specs, layers, session, seed), kernel)


def _of_expert_pool(config: TransformerConfig, plan: Plan) -> TransformerConfig:
    """The model's configuration as it is on expert ranks, which have a parallelism of their own."""
    config = copy(config)
    config.tensor_model_parallel_size, config.sequence_parallel, config.context_parallel_size = 1, False, 1
    config.expert_tensor_parallel_size = plan.expert_tensor_parallel
    return config


def _replacements(
    session: Session, flags: Flags, seed: int, meter: Meter, measurements: dry_run.Measurements | None, marks: Marks
) -> dict[str, Callable[[Any], Any]]:
    """What each patch of the inventory puts in place of the original."""
    forward_backward = ForwardBackward(
        session, marks, meter, measurements, slow_down(flags, session), flags.self_check,
        AttentionGraphs(graphs_for(session.device)) if flags.cuda_graphs and session.is_attention else None,
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

    def mtp_block_spec(original: Any) -> Any:
        return prediction.with_layers(
            original, lambda specs, config: attention_specs(specs, session.mtp_layers(-1), config, seed, session))

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
        "megatron.training.models.gpt.mtp_block_spec": mtp_block_spec,
    }
