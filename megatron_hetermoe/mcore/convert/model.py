"""The model of a recipe as Megatron keeps it in a checkpoint: built without weights, for its names and shapes."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import validate_args
from megatron.training.models.gpt import GPTModelBuilder
from torch.overrides import TorchFunctionMode

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.recipe import by_flag, override
from megatron_hetermoe.config.stages import SIZE, STAGE_FLAGS
from megatron_hetermoe.mcore.arguments import Asked, parse

Entry = ShardedTensor | ShardedTensorFactory

# A checkpoint knows no layout, so what a recipe says of its ranks, its steps and its saves does not count.
_ALONE = (
    "--tensor-model-parallel-size", "1", SIZE, "1", "--context-parallel-size", "1",
    "--expert-model-parallel-size", "1", "--expert-tensor-parallel-size", "1", "--micro-batch-size", "1",
    "--global-batch-size", "1", "--train-iters", "1", "--distributed-backend", "gloo", "--transformer-impl", "local",
)
_LEFT_OUT = (
    "--sequence-parallel", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather",
    *(flag for flag in STAGE_FLAGS if flag != SIZE), "--hierarchical-context-parallel-sizes",
    "--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-modules",
    "--step-batch-size-schedule", "--train-samples", "--lr-warmup-iters", "--lr-warmup-samples", "--lr-decay-iters",
    "--lr-decay-samples", "--lr-warmup-fraction", "--async-save", "--async-strategy", "--load", "--save",
    "--save-interval", "--dist-ckpt-optim-fully-reshardable",
)


def arguments(argv: Sequence[str], problems: Problems) -> argparse.Namespace:
    """Megatron's arguments of one rank that has the whole model.

    Args:
        argv: a recipe's flags, as the CPU can do them.
        problems: gets what Megatron does not accept.

    Raises:
        UsageError: with all problems.
    """
    given = {flag for flag, _ in by_flag(argv, Problems())}
    args = parse(override(argv, _ALONE, [flag for flag in _LEFT_OUT if flag in given]), problems, Asked())
    try:
        validate_args(args, {})
    except (AssertionError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        problems.add(f"Megatron does not accept these flags: {error}")
        problems.raise_if_any()
    return args


class _NoData(TorchFunctionMode):
    """Tensors that are made have a shape and no memory."""

    _MAKERS = frozenset(("empty", "zeros", "ones", "full"))

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in self._MAKERS:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Megatron's process groups in a world of one process, which is made if there is none."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_world_size() == 1
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if made:
            dist.destroy_process_group()


def entries(args: argparse.Namespace, impl: str, rows: int) -> tuple[dict[str, Entry], list[ShardedObject]]:
    """What the checkpoint of a model holds, inside ``alone``.

    Args:
        args: from ``arguments``.
        impl: the recipe's ``--transformer-impl``, whose names of some tensors differ.
        rows: of the embedding.

    Returns:
        for each parameter and buffer by its name in the model its place in the checkpoint, without data; and the objects
        that stand beside them.
    """
    config = gpt_config_from_args(args)
    config.transformer.perform_initialization, config.transformer.use_cpu_initialization = False, True
    config.vocab_size, config.should_pad_vocab = rows, False
    with _NoData():
        model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True, None)
    state = model.sharded_state_dict(metadata=content_metadata())
    tensors = {name: entry for name, entry in state.items() if isinstance(entry, Entry)}
    if impl == "transformer_engine":
        for name, entry in tensors.items():
            entry.key = _under_transformer_engine(name, entry.key, f"{name.rpartition('.pre_')[0]}.mlp.router.weight" in state)
    if args.untie_embeddings_and_output_weights is False:
        tensors.pop("output_layer.weight", None)  # the embedding under another name
    return tensors, [entry for entry in state.values() if isinstance(entry, ShardedObject)]


def content_metadata() -> dict[str, Any]:
    """How Megatron 0.19 keeps a model in a checkpoint, in its own words."""
    return {"singleton_local_shards": False, "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _under_transformer_engine(name: str, key: str, has_experts: bool) -> str:
    """A parameter's key in a checkpoint of a model of transformer-engine's modules.

    Those fuse a norm into the linear layer behind it, and local ones take that name; but before experts nothing is fused.
    """
    if has_experts and name.endswith(".pre_mlp_layernorm.weight"):
        return key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    return key
