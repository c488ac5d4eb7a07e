"""Pipeline stages as Megatron's flags have them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_hetermoe.config.errors import Problems

# What a pipeline of a disaggregated run does not do: the flag, whether the arguments ask for it, and the way out.
UNSUPPORTED_STAGES: tuple[tuple[str, Callable[[argparse.Namespace], object], str], ...] = (
    ("--mtp-num-layers with pipeline stages and tied embeddings",
     lambda args: args.mtp_num_layers and args.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights,
     "add --untie-embeddings-and-output-weights; stock Megatron cannot make a checkpoint of it either"),
)


def stage_layers(args: argparse.Namespace) -> tuple[int, ...]:
    """The layers of each pipeline stage, empty for one stage; of each chunk where stages have several, as ``Plan`` has them.

    As Megatron divides them (transformer_block.py, get_num_layers_to_build), with the rest of a division left out. Those
    that predict further tokens are the last stage's.
    """
    stages = args.pipeline_model_parallel_size
    if stages <= 1 or not args.num_layers:
        return ()
    if args.pipeline_model_parallel_layout:
        return tuple(stage.count(LayerType.decoder) + stage.count(LayerType.mtp)
                     for stage in PipelineParallelLayerLayout.parse_str_to_list(args.pipeline_model_parallel_layout))
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    others = stages - (first is not None) - (last is not None)
    embedding, loss = args.account_for_embedding_in_pipeline_split, args.account_for_loss_in_pipeline_split
    layers = [(args.num_layers + embedding + loss - (first or 0) - (last or 0)) // max(1, others)] * stages
    layers[0] -= embedding
    layers[-1] -= loss
    if first is not None:
        layers[0] = first
    if last is not None:
        layers[-1] = last
    virtual = virtual_stages(args)
    if virtual > 1:
        # What counts as a layer is not in the first or last chunk, whatever else is divided.
        layers[0], layers[-1] = layers[0] + embedding, layers[-1] + loss
        layers = [of_stage // virtual for of_stage in layers] * virtual
        layers[0], layers[-1] = layers[0] - embedding, layers[-1] - loss
    layers[-1] += args.mtp_num_layers or 0
    return tuple(layers)


def virtual_stages(args: argparse.Namespace) -> int:
    """Chunks that each pipeline stage has."""
    stages = args.pipeline_model_parallel_size
    if stages <= 1:
        return 1
    if args.pipeline_model_parallel_layout:
        return max(1, PipelineParallelLayerLayout.get_num_stages_from_str(args.pipeline_model_parallel_layout) // stages)
    if args.num_virtual_stages_per_pipeline_rank:
        return args.num_virtual_stages_per_pipeline_rank
    if args.num_layers_per_virtual_pipeline_stage:
        counted = args.num_layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        return max(1, counted // stages // args.num_layers_per_virtual_pipeline_stage)
    return 1


def can_be_staged(args: argparse.Namespace, problems: Problems) -> bool:
    """Whether the number of pipeline stages makes sense; notes what keeps it from working."""
    stages = args.pipeline_model_parallel_size
    if not 1 <= stages <= args.num_layers:
        problems.add(f"--pipeline-model-parallel-size {stages} with {args.num_layers} layers: it must be from 1 to that")
        return False
    for flag, value in (("--num-virtual-stages-per-pipeline-rank", args.num_virtual_stages_per_pipeline_rank),
                        ("--num-layers-per-virtual-pipeline-stage", args.num_layers_per_virtual_pipeline_stage)):
        if value is not None and value < 1:
            problems.add(f"{flag} is {value}: it must be from 1 on")
            return False
    if args.pipeline_model_parallel_layout:
        wrong = division_problems(args.pipeline_model_parallel_layout, stages)
        for problem in wrong:
            problems.add(problem)
        if wrong:
            return False
    return True


def division_problems(layout: str, stages: int) -> list[str]:
    """What is wrong with a ``--pipeline-model-parallel-layout`` for so many stages. What it must have in all, Megatron says."""
    try:
        parsed = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError as error:
        return [f"--pipeline-model-parallel-layout {layout} cannot be read: {error}"]
    if len(parsed) % stages:
        return [f"--pipeline-model-parallel-layout {layout} has {len(parsed)} stages, which --pipeline-model-parallel-size "
                f"{stages} does not divide: change one"]
    if any(LayerType.mtp in stage for stage in parsed[:-1]):
        return [f"--pipeline-model-parallel-layout {layout} has layers that predict further tokens before the last stage: "
                "put them into it"]
    return []
