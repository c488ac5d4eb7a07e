"""One rank of a benchmark: trains, and writes what each step took (``record.py``).

    rank.py RECORD KERNEL SECONDS [--timed STEPS] [--longer SECONDS] -- FLAGS...

With ``--hetermoe`` among the flags it is the plugin's run, without it stock Megatron's, whose own attention is replaced by
KERNEL, which the plugin's flags name, and whose experts by ours, so that no kernel of ours is measured against none. Both have
the same optimizer (``fused.py``) and begin with the same weights (``weights.py``).
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_hetermoe.mcore.platform import cpu

if cpu.needed():
    cpu.install()  # before Megatron is imported

import torch  # noqa: E402
from fused import fuse_adam  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402
from megatron.training import pretrain  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.models.gpt import default_layer_spec  # noqa: E402
from record import record_steps  # noqa: E402
from throttle import Wait, throttle_channels, throttle_stock  # noqa: E402
from weights import begin_alike  # noqa: E402

from megatron_hetermoe import pretrain_gpt  # noqa: E402
from megatron_hetermoe.config.errors import Problems  # noqa: E402
from megatron_hetermoe.mcore import gpt  # noqa: E402
from megatron_hetermoe.mcore.attention import moe_submodules  # noqa: E402
from megatron_hetermoe.mcore.experts import HeldExperts  # noqa: E402
from megatron_hetermoe.mcore.grouped import GroupedExperts  # noqa: E402
from megatron_hetermoe.mcore.platform import wheel  # noqa: E402
from megatron_hetermoe.mcore.sdpa import with_kernel  # noqa: E402


def run_stock(flags: list[str], kernel: str) -> None:
    """Stock Megatron with one kernel of torch's for attention."""
    _, flags = pretrain_gpt.prepared(flags, Problems())
    if not cpu.needed():
        wheel.install()  # it could not start from the wheel otherwise
    sys.argv = [sys.argv[0], *flags]
    args = parse_and_validate_args()
    model = gpt_config_from_args(args)

    def layers(config, vp_stage=None):
        spec = default_layer_spec(config, vp_stage)
        first = 1 + get_transformer_layer_offset(config.transformer, vp_stage)
        spec.layer_specs = with_our_experts(with_kernel(spec.layer_specs, kernel), args, first)
        return spec

    model.transformer_layer_spec = layers
    torch.cuda.set_device(args.local_rank)
    pretrain(pretrain_cfg_container_from_args(args, model), gpt.datasets_provider, ModelType.encoder_or_decoder,
             gpt.forward_step)


def with_our_experts(layer_specs: list, args: argparse.Namespace, first: int) -> list:
    """Stock layers whose experts run as ours do on this GPU: together, where it has a kernel for that.

    Args:
        layer_specs: of this rank.
        args: Megatron's.
        first: the number of the first of these layers, from 1 on.
    """
    together = args.bf16 and not cpu.needed() and torch.cuda.get_device_capability()[0] in (9, 10)
    replaced = []
    for layer, spec in enumerate(layer_specs, start=first):
        spec = copy(spec)
        spec.submodules = copy(spec.submodules)
        stock_experts = moe_submodules(spec).experts

        def experts(count, config, pg_collection=None, layer=layer, stock_experts=stock_experts, **others):
            first = count * pg_collection.ep.rank()
            held = tuple(range(first, first + count))
            # Rows come from Megatron's dispatcher in the order of experts, which is the reverse of what is held together.
            kind, held = (GroupedExperts, held[::-1]) if together else (HeldExperts, held)
            return kind(config, stock_experts.keywords["submodules"], layer, held, args.seed, pg_collection)

        mlp = spec.submodules.mlp
        spec.submodules.mlp = partial(
            mlp.func, *mlp.args, **{**mlp.keywords, "submodules": replace(moe_submodules(spec), experts=experts)})
        replaced.append(spec)
    return replaced


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("kernel")
    parser.add_argument("seconds", type=float, help="after which it ends with the stacks of all threads, as one that hangs")
    parser.add_argument("--timed", type=int, default=1 << 30, metavar="STEPS", help="profile those that follow")
    parser.add_argument("--longer", type=float, default=0.0, metavar="SECONDS", help="that each byte of traffic takes longer")
    split = sys.argv.index("--")
    args, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1:]
    faulthandler.dump_traceback_later(args.seconds, exit=True)
    wait = Wait()
    record_steps(Path(f"{args.record}.{os.environ['RANK']}"), args.timed, wait.settle)
    fuse_adam()
    begin_alike()
    disaggregated = "--hetermoe" in flags
    if args.longer:
        (throttle_channels if disaggregated else throttle_stock)(wait, args.longer)
    if disaggregated:
        return pretrain_gpt.main(flags)
    run_stock(flags, args.kernel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
