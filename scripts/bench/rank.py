"""One rank of a benchmark: ``rank.py RECORD KERNEL SECONDS FLAGS...`` trains and writes the seconds and loss of each step.

With ``--hetermoe`` among the flags it is the plugin's run, without it stock Megatron's, whose own attention is replaced by
KERNEL, which the plugin's flags name, and whose experts by ours, so that no kernel of ours is measured against none. Both have
the same optimizer (``fused.py``).
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import sys
import time
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from fused import fuse_adam
from megatron.core.enums import ModelType
from megatron.training import pretrain, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import default_layer_spec

from megatron_hetermoe import pretrain_gpt
from megatron_hetermoe.mcore import gpt
from megatron_hetermoe.mcore.attention import moe_submodules
from megatron_hetermoe.mcore.grouped import GroupedExperts
from megatron_hetermoe.mcore.platform import wheel
from megatron_hetermoe.mcore.sdpa import with_kernel


def record_steps(path: Path) -> None:
    """Writes a line for each training step: its seconds with the device idle before and after, and its loss."""
    file = path.open("w", buffering=1, encoding="utf-8")
    original = training.train_step

    @functools.wraps(original)
    def timed(*args, **kwargs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = original(*args, **kwargs)
        torch.cuda.synchronize()
        loss = result[0].get("lm loss")
        file.write(json.dumps({
            "seconds": time.perf_counter() - start, "loss": None if loss is None else float(loss),
            "memory": torch.cuda.max_memory_reserved(),
        }) + "\n")
        return result

    training.train_step = timed


def run_stock(flags: list[str], kernel: str) -> None:
    """Stock Megatron with one kernel of torch's for attention."""
    wheel.install()  # it could not start from the wheel otherwise
    sys.argv = [sys.argv[0], *flags]
    args = parse_and_validate_args()
    model = gpt_config_from_args(args)

    def layers(config, vp_stage=None):
        spec = default_layer_spec(config, vp_stage)
        spec.layer_specs = with_grouped_experts(with_kernel(spec.layer_specs, kernel), args)
        return spec

    model.transformer_layer_spec = layers
    torch.cuda.set_device(args.local_rank)
    pretrain(pretrain_cfg_container_from_args(args, model), gpt.datasets_provider, ModelType.encoder_or_decoder,
             gpt.forward_step)


def with_grouped_experts(layer_specs: list, args) -> list:
    """Stock layers whose experts run as ours do on this GPU, where it has a kernel for all experts at once."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        return layer_specs
    replaced = []
    for layer, spec in enumerate(layer_specs, start=1):
        spec = copy(spec)
        spec.submodules = copy(spec.submodules)
        stock_experts = moe_submodules(spec).experts

        def experts(count, config, pg_collection=None, layer=layer, stock_experts=stock_experts, **others):
            first = count * pg_collection.ep.rank()
            # Rows come from Megatron's dispatcher in the order of experts, which is the reverse of what is held.
            held = tuple(reversed(range(first, first + count)))
            return GroupedExperts(config, stock_experts.keywords["submodules"], layer, held, args.seed, pg_collection)

        mlp = spec.submodules.mlp
        spec.submodules.mlp = partial(
            mlp.func, *mlp.args, **{**mlp.keywords, "submodules": replace(moe_submodules(spec), experts=experts)})
        replaced.append(spec)
    return replaced


def main() -> int:
    record, kernel, limit, *flags = sys.argv[1:]
    # A hang ends with the stacks of all threads in the log.
    faulthandler.dump_traceback_later(float(limit), exit=True)
    record_steps(Path(f"{record}.{os.environ['RANK']}"))
    fuse_adam()
    if "--hetermoe" in flags:
        return pretrain_gpt.main(flags)
    run_stock(flags, kernel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
