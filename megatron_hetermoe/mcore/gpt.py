"""What a training script gives ``megatron.training.pretrain`` for a GPT model: data, one forward step, the loss.

Megatron-Core's wheel has the training loop but no script. Tensor, pipeline and context parallelism go through
Megatron's own helpers. This module imports torch and Megatron, so the platform must be installed before it is.

Shapes: b is the microbatch in sequences, s the sequence length in tokens (of this context-parallel rank).
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_hetermoe.config.errors import Problems

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")

_REFUSED = {  # flags whose batches hold more than BATCH_KEYS
    "sft": "--sft",
    "fim_data": "--fim-data",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking",
    "hybrid_context_parallel": "--hybrid-context-parallel",
}

_SPIKE = 10  # times the largest loss so far, for --check-for-spiky-loss


def check_args(args: Namespace) -> None:
    """Raises UsageError when the flags ask for data that ``get_batch`` does not read."""
    problems = Problems()
    for name, flag in _REFUSED.items():
        if getattr(args, name, False):
            problems.add(f"{flag} is not supported; leave it out and train on whole sequences.")
    problems.raise_if_any()


# ----------------------------------------------------------------------------------------------- data


def _mtp_here(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this rank predicts further tokens, and so needs tokens and labels wherever it is in the pipeline."""
    if not args.mtp_num_layers:
        return False
    layout = args.pipeline_model_parallel_layout
    if layout is not None:
        layout = PipelineParallelLayerLayout.from_str(layout, args.pipeline_model_parallel_size)
    return mtp_on_this_rank(layout, args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)


def _has_batch(vp_stage: int | None) -> bool:
    """Whether this rank's part of the pipeline uses any of the batch."""
    return is_first_or_last_pipeline_stage(vp_stage) or _mtp_here(get_args(), vp_stage)


def reads_data(vp_stage: int | None = None) -> bool:
    """Whether this rank reads the data set itself: it is the first of its tensor-parallel ranks."""
    return _has_batch(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0


def datasets_provider(num_samples: Sequence[int | None], vp_stage: int | None = None):
    """The training, validation and test sets, in Megatron's form of a provider.

    Every rank of the world has to call it, also one that holds nothing, for the builder has barriers.

    Args:
        num_samples: sequences wanted of each of the three.
        vp_stage: the virtual stage of the pipeline, if there are any.
    """
    args = get_args()
    config = dataset_config(args)
    kind = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    return BlendedMegatronDatasetBuilder(kind, list(num_samples), partial(reads_data, vp_stage), config).build()


datasets_provider.is_distributed = True  # every rank calls it, not the first tensor-parallel ranks alone


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """The data flags as Megatron's description of a GPT data set."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path, encoding="utf-8") as file:
            sequences = json.load(file)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=sequences,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def get_batch(data_iterator: Iterator | None, vp_stage: int | None = None) -> dict[str, torch.Tensor | None]:
    """One microbatch on the device, as BATCH_KEYS.

    ``tokens``, ``labels`` and ``position_ids`` are int64 [b, s], ``loss_mask`` is float32 [b, s] and
    ``attention_mask`` is bool [b, 1, s, s], or None where attention makes its own causal mask. What this part of
    the pipeline does not use is None.
    """
    if not _has_batch(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        for key in BATCH_KEYS:
            value = sample.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_mtp_here(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {key: batch.get(key) for key in BATCH_KEYS}


# --------------------------------------------------------------------------------------- forward, loss


def loss_func(loss_mask: torch.Tensor, output_tensor: torch.Tensor):
    """The microbatch's loss in Megatron's three parts.

    Args:
        loss_mask: [b, s], 1 for a token that counts and 0 for one that does not.
        output_tensor: [b, s], the cross entropy of each token.

    Returns:
        the loss summed over the tokens, with its graph; the number of tokens, int32; and for the log the two of
        them in one tensor, which Megatron sums over microbatches and ranks before it divides.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output_tensor.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    _validate(loss)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def _validate(loss: torch.Tensor) -> None:
    """Has Megatron's rerun machine look at the loss, which tells bad hardware from bad data, as the flags ask."""
    args = get_args()
    machine = get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks.append((torch.isnan, "found NaN in local forward loss calculation", 0.0, True))
        checks.append((torch.isinf, "found Inf in local forward loss calculation", 0.0, True))
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        checks.append((spiky, "Spiky loss", 0.0, False))
    for rejects, message, tolerance, fatal in checks:
        machine.validate_result(
            result=loss, rejection_func=rejects, message=message, tolerance=tolerance, fatal=fatal
        )


def forward_step(data_iterator: Iterator | None, model: torch.nn.Module):
    """Runs one microbatch forward. Returns the model's output and the function that makes the loss of it."""
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timer.stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def run_stock(argv: Sequence[str]) -> None:
    """Trains with Megatron's flags ``argv``, with nothing of HeterMoE in the run."""
    # Megatron parses sys.argv and takes no other list.
    sys.argv = [sys.argv[0], *argv]
    args = parse_and_validate_args()
    check_args(args)
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
