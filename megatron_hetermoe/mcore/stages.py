"""Pipeline stages as Megatron's flags have them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import Flags

_UNEVEN = "give --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"

# What a pipeline of a disaggregated run does not do: the flag, whether the arguments ask for it, and the way out.
UNSUPPORTED_STAGES: tuple[tuple[str, Callable[[argparse.Namespace], object], str], ...] = (
    ("--num-layers-per-virtual-pipeline-stage", lambda args: args.num_layers_per_virtual_pipeline_stage,
     "leave it out: a wave of several microbatches fills a stage"),
    ("--num-virtual-stages-per-pipeline-rank", lambda args: args.num_virtual_stages_per_pipeline_rank,
     "leave it out: a wave of several microbatches fills a stage"),
    ("--pipeline-model-parallel-layout", lambda args: args.pipeline_model_parallel_layout, _UNEVEN),
    ("--account-for-embedding-in-pipeline-split", lambda args: args.account_for_embedding_in_pipeline_split, _UNEVEN),
    ("--account-for-loss-in-pipeline-split", lambda args: args.account_for_loss_in_pipeline_split, _UNEVEN),
    ("--mtp-num-layers with pipeline stages and tied embeddings",
     lambda args: args.mtp_num_layers and args.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights,
     "add --untie-embeddings-and-output-weights; stock Megatron cannot make a checkpoint of it either"),
)


def stage_layers(args: argparse.Namespace) -> tuple[int, ...]:
    """The layers of each pipeline stage, empty for one stage.

    As Megatron divides them (transformer_block.py, get_num_layers_to_build), with the rest of a division left out. Those
    that predict further tokens are the last stage's.
    """
    stages = args.pipeline_model_parallel_size
    if stages <= 1 or not args.num_layers:
        return ()
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    others = stages - (first is not None) - (last is not None)
    layers = [(args.num_layers - (first or 0) - (last or 0)) // max(1, others)] * stages
    if first is not None:
        layers[0] = first
    if last is not None:
        layers[-1] = last
    layers[-1] += args.mtp_num_layers or 0
    return tuple(layers)


def can_be_staged(args: argparse.Namespace, flags: Flags, problems: Problems) -> bool:
    """Whether the number of pipeline stages makes sense; notes what keeps it, or what is asked beside it, from working."""
    stages = args.pipeline_model_parallel_size
    if not 1 <= stages <= args.num_layers:
        problems.add(f"--pipeline-model-parallel-size {stages} with {args.num_layers} layers: it must be from 1 to that")
        return False
    for name, asked in (("--hetermoe-trace", flags.trace), ("--hetermoe-dry-run", flags.dry_run)):
        if asked and stages > 1:
            problems.add(f"{name} is not supported with --pipeline-model-parallel-size {stages}: leave it out")
    return True
