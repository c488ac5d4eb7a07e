"""``python -m megatron_hetermoe.pretrain_gpt``: trains a GPT model with Megatron's flags.

Runs under any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. torch and Megatron are imported in
``main``, since what Megatron finds at its import depends on the platform.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_hetermoe.config.errors import Problems, UsageError, tell
from megatron_hetermoe.config.flags import Flags, parse_flags
from megatron_hetermoe.config.recipe import value_of


def main(argv: Sequence[str] | None = None) -> int:
    """Trains. ``argv`` are the flags, those of the command line when None. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _train(argv)
    except UsageError as error:
        return tell(error)
    leave()
    return 0


def _train(argv: list[str]) -> None:
    problems = Problems()
    flags, argv = prepared(argv, problems)
    if not flags.enabled:
        from megatron_hetermoe.mcore import gpt

        gpt.run_stock(argv)
        return
    from megatron_hetermoe.mcore import patches

    patches.check(patches.RUN)  # before what follows is imported, which needs a Megatron that fits
    from megatron_hetermoe.mcore import pretrain
    from megatron_hetermoe.mcore.arguments import disaggregated_arguments

    args, plan = disaggregated_arguments(flags, argv, problems)
    pretrain.run(args, plan, flags)


def prepared(argv: Sequence[str], problems: Problems) -> tuple[Flags, list[str]]:
    """What comes before Megatron is imported: the ``--hetermoe`` flags are taken out, and the platform is made ready.

    Args:
        argv: all flags.
        problems: gets what is wrong with ours.

    Returns:
        our flags, and Megatron's, as the platform can do them.

    Raises:
        UsageError: if something is wrong with our flags and they do not switch us on.
    """
    flags, rest = parse_flags(argv, problems)
    if problems and not flags.enabled:
        problems.raise_if_any()
    from megatron_hetermoe.mcore.platform import compiler, cpu
    from megatron_hetermoe.mcore.platform.flags import for_cpu

    if cpu.needed():
        cpu.install()
        rest, changes = for_cpu(with_default(rest, "--distributed-backend", "gloo"))
        if os.environ.get("RANK", "0") == "0":
            for line in changes:
                print(line, flush=True)
        return flags, rest
    if flags.slow_down is not None:
        problems.add("--hetermoe-slow-down is for ranks without a GPU, whose tasks wait: leave it out")
    why = compiler.choose(rest, compiler.capability_here()) if flags.enabled else ""
    if why and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"hetermoe: --disable-jit-fuser is on: {why}, for which torch's compiler is not made; "
              f"{compiler.SWITCH}=0 has it try", flush=True)
    return flags, rest


def leave() -> None:
    """Ends a rank when all have come to their end: one that leaves early takes down those that still talk to it."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def with_default(argv: Sequence[str], flag: str, value: str) -> list[str]:
    """``argv`` with ``flag value`` added, unless it has the flag in either spelling."""
    return [*argv, flag, value] if value_of(argv, flag) is None else list(argv)


if __name__ == "__main__":
    sys.exit(main())
