"""Flags of Megatron that a disaggregated run refuses, with the way out, and those that its layout or schedule decides.

What Megatron's flags ask for is mostly done by Megatron's own code and needs no word here. A flag belongs here when what
reads it is not run: Megatron's schedules, its dispatchers, its set-up of process groups, its recomputation of layers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from megatron_hetermoe.config.batches import FLAG as GROWING
from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.mcore.graphs import FLAG as GRAPHS
from megatron_hetermoe.mcore.platform import cpu
from megatron_hetermoe.mcore.recompute import SELECTIVE
from megatron_hetermoe.mcore.stages import UNSUPPORTED_STAGES

Asked = Callable[[argparse.Namespace], object]
Refused = tuple[str, Asked, str]  # the flag, whether Megatron's parsed arguments ask for it, and the way out

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_LEAVE_OUT = "leave it out"


def _given(*flags: str, way_out: str = _LEAVE_OUT) -> tuple[Refused, ...]:
    """Flags of which any value asks for what is not there."""
    return tuple((flag, lambda args, name=flag[2:].replace("-", "_"): getattr(args, name), way_out) for flag in flags)


def _not_recomputed(args: argparse.Namespace) -> bool:
    return args.recompute_granularity == "selective" and not SELECTIVE.issuperset(args.recompute_modules or ())


_PARALLELISM: tuple[Refused, ...] = (
    ("--tensor-model-parallel-size above 1 without --sequence-parallel",
     lambda args: args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
     "add it; Megatron does not train a mixture of experts without it either"),
    ("--tensor-model-parallel-size above 1 with --transformer-impl local on a GPU",
     lambda args: args.tensor_model_parallel_size > 1 and args.transformer_impl == "local" and not cpu.needed(),
     "use transformer_engine; torch's norms know no sequence parallelism, in stock Megatron too"),
    ("tensor or context parallelism on GPUs with CUDA_DEVICE_MAX_CONNECTIONS other than 1",
     lambda args: max(args.tensor_model_parallel_size, args.context_parallel_size) > 1
     and os.environ.get(_CONNECTIONS) != "1" and not cpu.needed(),
     f"export {_CONNECTIONS}=1 for all ranks; Megatron asks for it on GPUs before Blackwell, and pools may be of both"),
    ("--tp-comm-overlap", lambda args: args.tp_comm_overlap, "leave it out: the schedule overlaps"),
    *UNSUPPORTED_STAGES,
    *_given("--hierarchical-context-parallel-sizes", "--tensor-parallel-num-weight-shards",
            "--expert-tensor-parallel-num-weight-shards", "--defer-embedding-wgrad-compute", "--use-megatron-fsdp",
            "--use-torch-fsdp2", "--init-model-with-meta-device"),
    *_given("--overlap-moe-expert-parallel-comm", way_out="leave it out: the schedule overlaps"),
    *_given("--delay-wgrad-compute", "--overlap-dispatch-backward-with-experts-wgrad",
            way_out="use --hetermoe-weight-gradients delayed in its place"),
    ("--num-distributed-optimizer-instances above 1", lambda args: args.num_distributed_optimizer_instances > 1,
     "set it to 1"),
)

_GROUPS: tuple[Refused, ...] = (
    *_given("--use-tp-pp-dp-mapping", way_out="leave it out: ranks of a pool are in Megatron's other order"),
    *_given("--use-sharp", "--nccl-communicator-config-path", "--high-priority-stream-groups",
            way_out="leave it out: NCCL's environment variables hold for all groups"),
    *_given("--flight-recorder-dump-path", way_out="export TORCH_FR_DUMP_TEMP_FILE in its place"),
    *_given("--fake-process-group", "--lazy-mpu-init"),
)

_MODELS: tuple[Refused, ...] = (
    ("--transformer-impl inference_optimized", lambda args: args.transformer_impl == "inference_optimized",
     "use transformer_engine, or local"),
    *_given("--experimental-attention-variant", "--hybrid-layer-pattern", "--hybrid-override-pattern",
            "--mtp-hybrid-override-pattern", "--heterogeneous-layers-config-path",
            "--heterogeneous-layers-config-encoded-json"),
    ("--position-embedding-type mrope", lambda args: args.position_embedding_type == "mrope",
     "use rope; its positions are those of images too"),
    *_given("--spec", way_out="leave it out: layers are Megatron's own"),
    ("--apply-layernorm-1p with --transformer-impl local",
     lambda args: args.layernorm_zero_centered_gamma and args.transformer_impl == "local",
     "use transformer_engine; torch's norms have none, in stock Megatron too"),
    ("--mtp-use-repeated-layer", lambda args: args.mtp_use_repeated_layer and args.mtp_num_layers,
     "leave it out: each further token has a layer of its own"),
    ("--mtp-detach-heads", lambda args: args.mtp_detach_heads and args.mtp_num_layers, _LEAVE_OUT),
    *_given("--moe-shared-expert-overlap", way_out="leave it out: a shared expert runs on the attention ranks"),
    *_given("--moe-latent-size", "--moe-expert-rank-capacity-factor", "--moe-paged-stash", "--moe-mlp-glu-interleave-size",
            "--moe-single-grouped-weight", "--moe-single-grouped-bias"),
    ("--mlp-chunks-for-training above 1", lambda args: args.mlp_chunks_for_training > 1,
     "leave it out: use --recompute-granularity full"),
    *_given("--use-te-activation-func"),
    *_given("--moe-use-upcycling", way_out="convert the checkpoint with stock Megatron first"),
)

_PRECISION: tuple[Refused, ...] = (
    ("--fp8-format", lambda args: args.fp8, _LEAVE_OUT),
    ("--fp4-format", lambda args: args.fp4, _LEAVE_OUT),
    *_given("--te-precision-config-file", "--use-kitchen-attention", "--fp32-residual-connection"),
    ("--moe-router-padding-for-quantization",
     lambda args: args.moe_router_padding_for_quantization or args.moe_router_padding_for_fp8, _LEAVE_OUT),
)

_MEMORY: tuple[Refused, ...] = (
    ("--recompute-modules of what is not there", _not_recomputed, f"choose from {', '.join(sorted(SELECTIVE))}"),
    *_given("--checkpoint-activations", way_out="use --recompute-granularity full"),
    *_given("--cpu-offloading-num-layers", "--fine-grained-activation-offloading",
            way_out="leave it out: use --recompute-granularity full"),
    *_given("--optimizer-cpu-offload", "--use-precision-aware-optimizer",
            way_out="leave it out: --use-distributed-optimizer divides the optimizer's state among ranks"),
    ("CUDA graphs", lambda args: args.cuda_graph_impl != "none", "use --cuda-graph-impl none, and "
     f"{GRAPHS} in its place"),
    *_given("--enable-cuda-graph", "--external-cuda-graph", way_out=f"use {GRAPHS} in its place"),
    *_given("--optimizer-cuda-graph"),
)

_TRAINING: tuple[Refused, ...] = (
    ("--ckpt-format other than torch_dist", lambda args: args.ckpt_format != "torch_dist", "use torch_dist"),
    *_given("--distrib-optim-fully-reshardable-mem-efficient"),
    *_given("--non-persistent-ckpt-type", way_out="leave it out: use a smaller --save-interval and --save-retain-interval"),
    *_given("--use-checkpoint-args", way_out="give the model's flags"),
    *_given("--yaml-cfg", way_out="give flags, or a recipe"),
    *_given("--inprocess-restart", "--enable-ft-package", way_out="leave it out: let the launcher start all ranks again"),
    *_given("--rampup-batch-size", way_out="Megatron does not read it any more; "
            f"{GROWING} TOKENS:SEQUENCES,... in place of --global-batch-size does that"),
    (f"{GROWING} beside --decrease-batch-size-if-needed",
     lambda args: args.step_batch_size_schedule and args.decrease_batch_size_if_needed, "leave one out"),
    ("--optimizer other than adam and sgd", lambda args: args.optimizer not in ("adam", "sgd"), "use adam or sgd"),
    *_given("--iterations-to-skip", way_out="leave it out: expert ranks read no data that they could skip"),
    *_given("--full-validation", "--multiple-validation-sets",
            way_out="leave it out: --eval-iters says how much, expert ranks know no data set's length"),
    *_given("--save-params-interval", "--save-activations-interval", "--save-tokens-per-expert-interval",
            "--save-wgrads-interval", "--save-dgrads-interval",
            way_out="leave it out: ranks of both pools would write to one file"),
    *_given("--log-straggler", way_out="use --hetermoe-trace in its place"),
    *_given("--log-max-attention-logit", "--perform-rl-step", "--logits-save-dir", "--logits-load-dir"),
)

UNSUPPORTED = (*_PARALLELISM, *_GROUPS, *_MODELS, *_PRECISION, *_MEMORY, *_TRAINING)


def check_supported(args: argparse.Namespace, problems: Problems) -> None:
    """Notes each flag that a disaggregated run does not do.

    Args:
        args: Megatron's, parsed, before its validation.
        problems: gets one for each.
    """
    for name, asked, way_out in UNSUPPORTED:
        if asked(args):
            problems.add(f"{name} is not supported with --hetermoe: {way_out}")


_CARRIES = "the asymmetric dispatcher carries tokens"
_HANDS_OVER = "stages hand over by tasks of the schedule"

# Flags of recipes that the layout and the schedule decide, and how.
_SUPERSEDED = {
    "--expert-model-parallel-size": "the expert ranks of a ZP group hold the experts",
    "--moe-token-dispatcher-type": _CARRIES,
    "--moe-grouped-gemm": "--hetermoe-experts says how experts run",
    **dict.fromkeys(
        ("--moe-enable-deepep", "--moe-flex-dispatcher-backend", "--moe-flex-dispatcher-num-sms", "--moe-deepep-num-sms",
         "--moe-hybridep-num-sms", "--moe-hybridep-num-blocks-permute", "--moe-hybridep-num-blocks-unpermute",
         "--moe-hybridep-num-sms-preprocessing", "--moe-hybridep-pad-uneven-dispatch-inputs",
         "--moe-permute-fusion-into-hybridep", "--moe-permute-fusion", "--moe-ncclep-static-shape",
         "--moe-ncclep-zero-copy"), _CARRIES),
    "--high-priority-a2a-comm-stream": "transfers have streams of their own",
    **dict.fromkeys(
        ("--use-ring-exchange-p2p", "--pipeline-model-parallel-comm-backend", "--no-overlap-p2p-communication",
         "--overlap-p2p-communication-warmup-flush", "--microbatch-group-size-per-virtual-pipeline-stage"), _HANDS_OVER),
}
# What Megatron's validation sees of them, where it would want what they go with.
_AS_IF = {
    "moe_token_dispatcher_type": "alltoall", "expert_model_parallel_size": 1, "moe_grouped_gemm": False,
    "moe_enable_deepep": False, "moe_permute_fusion": False, "moe_permute_fusion_into_hybridep": False,
    "moe_hybridep_pad_uneven_dispatch_inputs": False, "moe_ncclep_static_shape": False, "moe_ncclep_zero_copy": False,
    "use_ring_exchange_p2p": False, "overlap_p2p_comm_warmup_flush": False,
    "expert_tensor_parallel_size": 1,  # of attention ranks; the expert pool's is the plan's
}


def superseded(rest: Sequence[str], args: argparse.Namespace, gathers_keys: bool) -> list[str]:
    """A line for each flag that was given and that layout or schedule decides.

    Args:
        rest: Megatron's command line.
        args: parsed from it.
        gathers_keys: whether attention is by torch's kernels, for which context-parallel ranks gather keys and values.
    """
    reasons = dict(_SUPERSEDED)
    if gathers_keys and args.context_parallel_size > 1:
        reasons["--cp-comm-type"] = "torch's attention kernels have keys and values gathered"
    lines = [f"hetermoe: {flag} is superseded: {reason}" for flag, reason in reasons.items()
             if any(word == flag or word.startswith(f"{flag}=") for word in rest)]
    if args.tensor_model_parallel_size > 1 and args.expert_tensor_parallel_size is None:
        lines.append("hetermoe: experts are not split as attention is: --expert-tensor-parallel-size says how many expert "
                     "ranks share one")
    return lines


def supersede(args: argparse.Namespace) -> None:
    """Gives superseded flags the values with which Megatron's validation lets the others pass."""
    for name, value in _AS_IF.items():
        assert hasattr(args, name), name
        setattr(args, name, value)


def spell_out(args: argparse.Namespace) -> None:
    """What Megatron makes of older names of flags, some only when its configuration is made: so that checks see it."""
    if args.recompute_activations:
        args.recompute_granularity = "selective"
    if args.moe_layer_recompute and args.recompute_granularity != "full":
        args.recompute_granularity = "selective"
        modules = ["core_attn"] if args.recompute_modules is None else args.recompute_modules  # Megatron's default
        args.recompute_modules = [*modules, *({"moe"} - set(modules))]
