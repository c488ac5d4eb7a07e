"""Megatron's arguments of a disaggregated run: parsed, checked, and read for the model's shape, in one place."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

from megatron_hetermoe.config.batches import FLAG as GROWING
from megatron_hetermoe.config.batches import scheduled_batches
from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import Flags
from megatron_hetermoe.config.plan import DELAYED, Plan
from megatron_hetermoe.config.recipe import by_flag, hint
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.mcore.gpt import check_args
from megatron_hetermoe.mcore.graphs import FLAG as GRAPHS
from megatron_hetermoe.mcore.graphs import graph_problems
from megatron_hetermoe.mcore.implementation import ENGINE, expert_obstacle, without_engine
from megatron_hetermoe.mcore.platform import cpu
from megatron_hetermoe.mcore.session import DTYPES
from megatron_hetermoe.mcore.stages import can_be_staged, stage_layers, virtual_stages
from megatron_hetermoe.mcore.unsupported import check_supported as check_flags
from megatron_hetermoe.mcore.unsupported import spell_out, supersede, superseded
from megatron_hetermoe.planner.resolve import Parallelism, resolve
from megatron_hetermoe.topology.layout import EXPERT, layout_of


@dataclass(frozen=True)
class Asked:
    """How a training script asks Megatron for its arguments.

    Attributes:
        extra_args_provider: adds the script's own to the parser, and returns it.
        args_defaults: values for arguments that the user leaves out.
    """

    extra_args_provider: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] | None = None
    args_defaults: Mapping[str, Any] = field(default_factory=dict)


def disaggregated_arguments(
    flags: Flags, rest: Sequence[str], problems: Problems, asked: Asked = Asked()
) -> tuple[argparse.Namespace, Plan]:
    """Megatron's arguments, validated, and the run's plan.

    Nothing has been set up yet: no process group, no file. All ranks find the same.

    Args:
        flags: the ``--hetermoe`` ones.
        rest: the command line without them.
        problems: what was found so far.
        asked: by the training script.

    Raises:
        UsageError: with all problems.
    """
    args = parse(rest, problems, asked)
    plan = _resolved(args, flags, args.world_size, problems)
    problems.raise_if_any()
    lines = superseded(rest, args, gathers_keys=args.transformer_impl == "local" and _by_torch(plan))
    _validate(args, plan, problems, asked)
    if args.rank == 0:
        for line in lines:
            print(line, flush=True)
    return args, plan


def plan_elsewhere(flags: Flags, rest: Sequence[str], world_size: int) -> Plan:
    """The plan of a run on other machines: checked as far as that depends neither on their devices nor on this one's.

    Args:
        flags, rest: as of ``disaggregated_arguments``.
        world_size: ranks that will be started.

    Raises:
        UsageError: with all problems.
    """
    problems = Problems()
    plan = _resolved(parse(rest, problems, Asked()), flags, world_size, problems)
    problems.raise_if_any()
    return plan


def _resolved(args: argparse.Namespace, flags: Flags, world_size: int, problems: Problems) -> Plan | None:
    """The run's plan, None when there are problems with it; and all checks of Megatron's parsed arguments beside it."""
    shape = model_shape(args, problems)
    _check_supported(args, problems)
    plan = None
    if shape is not None and flags.enabled:
        precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"
        if can_be_staged(args, problems):
            plan = resolve(flags, shape, precision, world_size, problems, parallelism_of(args))
    if plan is not None:
        if plan.step is not None:
            _check_step(args, plan, flags, problems)
        if plan.context_parallel > 1 and plan.attention_kernel == "megatron" and args.transformer_impl == "local":
            problems.add("--hetermoe-attention megatron knows no context parallelism: leave it out")
        if args.transformer_impl == "local" and _by_torch(plan):
            _check_kernels(args, problems)
        if plan.weight_gradients == DELAYED and args.transformer_impl == ENGINE and args.add_bias_linear \
                and args.overlap_grad_reduce:
            # Such a bias has its gradient with those of activations, once for several microbatches that W tasks report.
            problems.add("--hetermoe-weight-gradients delayed is not supported with transformer-engine's biases beside "
                         "--overlap-grad-reduce: leave one out, or add --disable-bias-linear")
        obstacle = expert_obstacle(plan, activation_again(args))
        if obstacle and plan.expert_impl == ENGINE:
            problems.add(f"--hetermoe-expert-impl transformer_engine is not supported with {obstacle}: use auto")
        if args.loss_scale and plan.expert_precision == "fp32" != plan.attention_precision:
            problems.add("--loss-scale is not supported with experts in fp32: leave it out")
        if plan.weight_gradients == DELAYED and flags.cuda_graphs:
            problems.add(f"--hetermoe-weight-gradients delayed is not supported with {GRAPHS}: leave one out")
    if flags.cuda_graphs:
        graph_problems(args, problems)
    _check_saves(args, flags, problems)
    _check_batch(args, plan.attention_ranks if plan else flags.attention_ranks, problems)
    _check_divisible(args, problems)
    _check_warm_up(args, problems)
    _check_router(args, problems)
    if not (args.eval_interval or args.skip_train):
        problems.add("--eval-interval is missing: Megatron counts evaluations with it, without any too; add it, beside "
                     "--eval-iters 0 for none")
    return plan


def _check_supported(args: argparse.Namespace, problems: Problems) -> None:
    """What a disaggregated run does not do, and data that it does not read."""
    check_flags(args, problems)
    with problems.taking():
        check_args(args)


def _check_kernels(args: argparse.Namespace, problems: Problems) -> None:
    """What torch's attention kernels, which attend to all that came before, do not do."""
    for asked, flag in (
        (args.reset_attention_mask, "--reset-attention-mask"),
        (args.window_size, "--window-size"),
        (args.softmax_type != "vanilla", f"--softmax-type {args.softmax_type}"),
    ):
        if asked:
            problems.add(f"{flag} is not supported with torch's attention kernels, which see the whole sequence: leave it "
                         "out, or use --hetermoe-attention megatron")


def _by_torch(plan: Plan) -> bool:
    """Whether attention without transformer-engine is by torch's kernels (``mcore.sdpa.choose_kernel``)."""
    if plan.attention_kernel == "auto":
        return plan.context_parallel > 1 or not cpu.needed()
    return plan.attention_kernel != "megatron"


def arguments_to_plan_for(
    rest: Sequence[str], problems: Problems
) -> tuple[argparse.Namespace, ModelShape | None]:
    """Megatron's arguments, parsed but validated against no world, and the model's shape: all that a planner asks.

    Args:
        rest: a recipe's command line without the ``--hetermoe`` flags.
        problems: gets what keeps it from being a model to plan for.
    """
    args = parse(rest, problems, Asked())
    _check_supported(args, problems)
    sizes = {"--micro-batch-size": args.micro_batch_size, "--global-batch-size": args.global_batch_size}
    if args.step_batch_size_schedule is not None:
        del sizes["--global-batch-size"]
        problems.add("--step-batch-size-schedule is not planned for, a plan is for one batch: --drop "
                     "step-batch-size-schedule and, behind --, give the --global-batch-size that most steps have")
    for flag, value in sizes.items():
        if not value:
            problems.add(f"{flag} is missing: what fits and how long a step takes depends on it")
        elif value < 0:
            problems.add(f"{flag} is {value}: it must be from 1 on")
    if (args.micro_batch_size or 0) > 0 and (args.global_batch_size or 0) % args.micro_batch_size:
        problems.add(f"--global-batch-size {args.global_batch_size} does not divide by --micro-batch-size "
                     f"{args.micro_batch_size}: take a multiple of it")
    return args, model_shape(args, problems)


def parallelism_of(args: argparse.Namespace) -> Parallelism:
    """What Megatron's flags, before their validation, say of ranks that share weights or sequences."""
    return Parallelism(
        args.tensor_model_parallel_size, args.expert_tensor_parallel_size or 1, args.context_parallel_size,
        stage_layers(args), virtual_stages(args),
    )


def parse(rest: Sequence[str], problems: Problems, asked: Asked) -> argparse.Namespace:
    """Megatron's parser on our words, before its validation.

    Raises:
        UsageError: with what it has against each flag.
    """
    sys.argv = [sys.argv[0], *rest]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parse_args(asked.extra_args_provider)
    except SystemExit as exit_:
        if not exit_.code:
            raise  # --help
    else:
        spell_out(args)
        return args
    # It exits at its first fault. All are wanted, and making the parser again takes a second.
    for fault in _faults(rest, asked, said.getvalue()):
        problems.add(f"Megatron does not accept these flags: {fault}")
    problems.raise_if_any()
    raise AssertionError("unreachable")


class _Fault(Exception):
    """What a parser has against a flag."""


class _Parser(argparse.ArgumentParser):
    """One that does not exit."""

    def error(self, message: str) -> NoReturn:
        raise _Fault(message.removeprefix("argument "))


def _faults(rest: Sequence[str], asked: Asked, said: str) -> list[str]:
    """What Megatron's parser has against each flag, or else what it ``said`` of all."""
    parser = add_megatron_arguments(_Parser(add_help=False, allow_abbrev=False))
    if asked.extra_args_provider is not None:
        parser = asked.extra_args_provider(parser)
    known = parser._option_string_actions
    faults = []
    for flag, words in by_flag(rest, Problems()):
        if flag not in known:
            faults.append(f"unrecognized arguments: {flag}{hint(flag, known)}")
            continue
        try:
            _, more = parser.parse_known_args(words)
        except _Fault as fault:
            faults.append(str(fault))
        else:
            if more:
                most = "no value; write `true` for it in a recipe" if known[flag].nargs == 0 else "one value"
                faults.append(f"{flag} takes {most}, and is given {' '.join(words[1:])}")
    return faults or [said.rpartition("error: ")[2].strip()]


def model_shape(args: argparse.Namespace, problems: Problems) -> ModelShape | None:
    """The model's shape from Megatron's arguments, before or after their validation."""
    required = {
        "--num-layers": args.num_layers, "--hidden-size": args.hidden_size,
        "--num-attention-heads": args.num_attention_heads, "--seq-length": args.seq_length,
    }
    missing = [flag for flag, value in required.items() if value is None]
    if missing:
        problems.add(f"{', '.join(missing)} missing: the model's shape must be given")
    senseless = [f"{flag} is {value}" for flag, value in required.items() if value is not None and value < 1]
    if senseless:
        problems.add(f"{', '.join(senseless)}: each must be 1 or more")
    if not args.num_experts:
        problems.add("the model has no experts: --hetermoe is for mixture-of-experts models; give --num-experts")
    predicted = args.mtp_num_layers or 0
    if predicted < 0:
        problems.add(f"--mtp-num-layers is {predicted}: it must be from 0 on")
    if missing or senseless or not args.num_experts or predicted < 0:
        return None
    pattern = args.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(index % pattern == 0) for index in range(args.num_layers)]
    if len(pattern) != args.num_layers:
        problems.add(f"--moe-layer-freq names {len(pattern)} layers, --num-layers says {args.num_layers}: change one")
        return None
    if not any(pattern):
        problems.add("no layer has experts: --moe-layer-freq must name at least one")
    pattern = [*pattern, *pattern[-1:] * predicted]  # these are as the last layer
    dense_ffn = args.ffn_hidden_size or (
        int(4 * args.hidden_size * 2 / 3) // 64 * 64 if args.swiglu else 4 * args.hidden_size
    )
    return ModelShape(
        layers=args.num_layers + predicted,
        moe_layers=tuple(layer for layer, moe in enumerate(pattern, start=1) if moe),
        experts=args.num_experts,
        topk=args.moe_router_topk,
        hidden=args.hidden_size,
        expert_ffn=args.moe_ffn_hidden_size or dense_ffn,
        dense_ffn=dense_ffn,
        shared_expert_ffn=args.moe_shared_expert_intermediate_size or 0,
        gated=args.swiglu,
        heads=args.num_attention_heads,
        query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels or args.hidden_size // args.num_attention_heads,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        sequence=args.seq_length,
        mtp_layers=predicted,
        **(_latent(args) if args.multi_latent_attention else {}),
    )


def _latent(args: argparse.Namespace) -> dict[str, int]:
    """The widths of multi-latent attention."""
    return {"kv_lora_rank": args.kv_lora_rank, "q_lora_rank": args.q_lora_rank or 0, "qk_head_dim": args.qk_head_dim,
            "qk_position_dim": args.qk_pos_emb_head_dim, "v_head_dim": args.v_head_dim}


def _check_step(args: argparse.Namespace, plan: Plan, flags: Flags, problems: Problems) -> None:
    """What a plan's memory and times were reckoned with must be what the flags ask for."""
    asked = {
        "micro_batch": ("--micro-batch-size", args.micro_batch_size),
        "recompute": ("recomputation (--recompute-granularity, --recompute-modules)", recomputed(args)),
        "distributed_optimizer": ("--use-distributed-optimizer", args.use_distributed_optimizer),
        "activation_again": ("--recompute-modules moe_act", activation_again(args)),
        "cuda_graphs": (GRAPHS, flags.cuda_graphs),
    }
    for field, (flag, here) in asked.items():
        planned = getattr(plan.step, field)
        if planned != here:
            problems.add(f"the plan was made with {flag} {planned}, the flags say {here}: change the flag, or make a plan "
                         "for it")


def recomputed(args: argparse.Namespace) -> str:
    """What flags ask to run again, as a plan reckons with it: one of ``config.step.RECOMPUTE``."""
    if args.recompute_granularity == "full":
        return "full"
    modules = ["core_attn"] if args.recompute_modules is None else args.recompute_modules  # Megatron's default
    return "core_attn" if args.recompute_granularity == "selective" and "core_attn" in modules else "none"


def activation_again(args: argparse.Namespace) -> bool:
    """Whether flags ask for the output of experts' activation to be computed again."""
    return args.recompute_granularity == "selective" and "moe_act" in (args.recompute_modules or ())


def _check_saves(args: argparse.Namespace, flags: Flags, problems: Problems) -> None:
    """What saving in the background needs."""
    if not args.async_save:
        return
    if flags.on_save_failure == "continue":
        problems.add("--hetermoe-on-save-failure continue with --async-save: a save in the background fails in a later "
                     "step, when its data is gone; leave one out")
    if args.async_strategy == "nvrx" and not importlib.util.find_spec("nvidia_resiliency_ext"):
        problems.add("--async-save with --async-strategy nvrx needs nvidia-resiliency-ext, which is not installed: "
                     "install it, or use --async-strategy mcore")


def _check_batch(args: argparse.Namespace, attention_ranks: int | None, problems: Problems) -> None:
    """A global batch, each of a schedule too, must divide by the sequences that the attention ranks take at once."""
    if not attention_ranks or not args.micro_batch_size:
        return
    share = max(1, args.tensor_model_parallel_size * args.context_parallel_size * args.pipeline_model_parallel_size)
    together = args.micro_batch_size * max(1, attention_ranks // share)
    ranks = f"{attention_ranks} attention ranks" + (f" / {share} that share a microbatch" if share > 1 else "")
    batches = [("--global-batch-size", args.global_batch_size)]
    if args.step_batch_size_schedule is not None and args.seq_length:
        with problems.taking():
            scheduled = scheduled_batches(args.step_batch_size_schedule, args.seq_length)
            batches += [(f"{GROWING}'s batch of", batch) for _, batch in scheduled]
    for name, batch in batches:
        lower = int(batch or 0) // together * together
        if lower != int(batch or 0):
            near = f"{lower} or {lower + together}" if lower else str(together)
            problems.add(f"{name} {batch} does not divide by micro batch size {args.micro_batch_size} x "
                         f"{ranks} = {together}: take {near}")


def _check_divisible(args: argparse.Namespace, problems: Problems) -> None:
    """What tensor parallelism divides has to divide; Megatron would find it when ranks have met."""
    attention, experts = args.tensor_model_parallel_size, args.expert_tensor_parallel_size or 1
    context = args.context_parallel_size
    sequence = attention * (2 * context if context > 1 else 1)  # each rank has a part near the start and one near the end
    for flag, parts, size_flag, size in (
        ("--tensor-model-parallel-size by twice --context-parallel-size" if context > 1 else
         "--tensor-model-parallel-size", sequence, "--seq-length", args.seq_length),
        ("--tensor-model-parallel-size", attention, "--ffn-hidden-size", args.ffn_hidden_size),
        ("--tensor-model-parallel-size", attention, "--moe-shared-expert-intermediate-size",
         args.moe_shared_expert_intermediate_size),
        ("--expert-tensor-parallel-size", experts, "--moe-ffn-hidden-size",
         args.moe_ffn_hidden_size or args.ffn_hidden_size),
    ):
        if size and parts > 1 and size % parts:
            problems.add(f"{flag} {parts} does not divide {size_flag} {size}: take a divisor")


def _check_warm_up(args: argparse.Namespace, problems: Problems) -> None:
    """The learning rate's warm-up must end before its decay; Megatron asserts it after the ranks have met."""
    if args.lr_warmup_fraction is not None:
        return
    for unit in ("iters", "samples"):
        warm_up, decay, steps = (getattr(args, f"{name}_{unit}") for name in ("lr_warmup", "lr_decay", "train"))
        end, flag = (decay, "lr-decay") if decay else (steps, "train")
        if end and warm_up >= end:
            problems.add(f"--lr-warmup-{unit} {warm_up} does not end before --{flag}-{unit} {end}: make it smaller, or "
                         "give --lr-warmup-fraction")


def _check_router(args: argparse.Namespace, problems: Problems) -> None:
    """What Megatron's router and experts assert in the first step."""
    kinds = args.moe_router_load_balancing_type
    kinds = kinds if isinstance(kinds, list) else [kinds]
    for kind in ("sinkhorn", "quantile_balancing"):  # both balance without a loss
        if kind in kinds and args.moe_aux_loss_coeff not in (0, 0.0, [0.0], None):
            problems.add(f"--moe-router-load-balancing-type {kind} does not take --moe-aux-loss-coeff "
                         f"{args.moe_aux_loss_coeff}: set it to 0")
    if "quantile_balancing" in kinds and args.moe_router_group_topk:
        problems.add("--moe-router-load-balancing-type quantile_balancing does not take --moe-router-group-topk: leave one "
                     "out")
    if args.moe_apply_probs_on_input and args.moe_router_topk > 1:
        problems.add(f"--moe-apply-probs-on-input does not take --moe-router-topk {args.moe_router_topk}: set it to 1, or "
                     "leave the former out")


def _validate(args: argparse.Namespace, plan: Plan, problems: Problems, asked: Asked) -> None:
    """Megatron's own validation, which takes the world to be the ranks that have data: the attention ranks."""
    world_size, args.world_size = args.world_size, plan.attention_ranks
    supersede(args)
    # Megatron does it inside transformer-engine's grouped experts only, and refuses it without them.
    args.activation_again = activation_again(args)
    without_engine(args)
    if args.activation_again:
        args.recompute_modules = [module for module in args.recompute_modules if module != "moe_act"]
    try:
        validate_args(args, dict(asked.args_defaults))
        # These have checks of their own, which would come after the ranks have met.
        core_transformer_config_from_args(args)
        get_megatron_optimizer_config(args)
        get_megatron_ddp_config(args)
    except (AssertionError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        problems.add(f"Megatron does not accept these flags: {str(error) or _assertion(error)}")
    problems.raise_if_any()
    args.world_size = world_size
    # Both pools need not have as many optimizers, so timers of theirs must not meet at a barrier of the world.
    args.barrier_with_L1_time = False
    # A second set of groups, which only the legacy checkpoint format uses.
    args.use_gloo_process_groups = False


def set_precision(args: argparse.Namespace, plan: Plan) -> None:
    """Megatron's precision of this rank, whose role may have another one than the flags say; when the rank is in pool order."""
    if layout_of(plan).role(args.rank) == EXPERT:
        args.fp16, args.bf16 = plan.expert_precision == "fp16", plan.expert_precision == "bf16"
        args.params_dtype = DTYPES[plan.expert_precision]
    if plan.has_loss_scale and not args.loss_scale:
        # Megatron's own rule for fp16: what is not finite tells the loss scale to sink.
        args.check_for_nan_in_loss_and_grad = False


def _assertion(error: BaseException) -> str:
    """What a bare assertion asserts."""
    return traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
