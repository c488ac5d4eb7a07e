"""``python -m megatron_hetermoe.pretrain_gpt``: trains a GPT model with Megatron's flags.

Runs under any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. torch and Megatron are imported in
``main``, since what Megatron finds at its import depends on the platform.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_hetermoe.config.errors import EXIT_CODE, Problems, UsageError
from megatron_hetermoe.config.flags import parse_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Trains. ``argv`` are the flags, those of the command line when None. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _train(argv)
    except UsageError as error:
        return refuse(error)
    return 0


def refuse(error: UsageError) -> int:
    """Says what is wrong, once a machine since all ranks find the same. Returns the exit code."""
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        print(error.message(), file=sys.stderr, flush=True)
    return EXIT_CODE


def _train(argv: list[str]) -> None:
    problems = Problems()
    flags, argv = parse_flags(argv, problems)
    if problems and not flags.enabled:
        problems.raise_if_any()
    from megatron_hetermoe.mcore.platform import cpu
    from megatron_hetermoe.mcore.platform.flags import for_cpu

    if cpu.needed():
        cpu.install()
        argv, changes = for_cpu(with_default(argv, "--distributed-backend", "gloo"))
        if os.environ.get("RANK", "0") == "0":
            for line in changes:
                print(line, flush=True)
    elif flags.slow_down is not None:
        problems.add("--hetermoe-slow-down is for ranks without a GPU, whose tasks wait: leave it out")
    import torch

    if flags.enabled:
        from megatron_hetermoe.mcore import patches, pretrain
        from megatron_hetermoe.mcore.arguments import disaggregated_arguments

        patches.check()
        args, plan = disaggregated_arguments(flags, argv, problems)
        pretrain.run(args, plan, flags)
    else:
        from megatron_hetermoe.mcore import gpt

        gpt.run_stock(argv)
    # A rank that leaves early takes down those that still talk to it.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def with_default(argv: Sequence[str], flag: str, value: str) -> list[str]:
    """``argv`` with ``flag value`` added, unless it has the flag in either spelling."""
    given = any(word == flag or word.startswith(flag + "=") for word in argv)
    return list(argv) if given else [*argv, flag, value]


if __name__ == "__main__":
    sys.exit(main())
