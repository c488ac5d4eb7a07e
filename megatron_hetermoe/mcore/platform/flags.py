"""What a recipe for GPUs asks for that a CPU has not: decided and named here, and nowhere else.

A recipe then trains on the CPU as it is, with its sizes cut. What stays on although a CPU is slow at it (bf16, for
one) is not in these tables. Needs neither torch nor Megatron.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.recipe import by_flag, override, value_of

_NEEDS_TE = "its kernels are transformer-engine's"

# Flags of recipes that are left out on a CPU, and why.
_DROPPED = {
    "--use-flash-attn": "flash attention needs a GPU",
    "--moe-grouped-gemm": _NEEDS_TE + ", so experts run one after the other",
    "--moe-permute-fusion": _NEEDS_TE,
    "--moe-router-fusion": _NEEDS_TE,
    "--cross-entropy-loss-fusion": _NEEDS_TE,
    "--cross-entropy-fusion-impl": _NEEDS_TE,
    "--tp-comm-overlap": _NEEDS_TE,
}

# Flags that must have another value.
_REPLACED = {"--transformer-impl": ("transformer_engine", "local", "transformer-engine needs a GPU")}

# Megatron's defaults that need kernels for a GPU; they are off without a word, as no recipe asked for them.
_OFF = (
    "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-rope-fusion", "--no-persist-layer-norm",
)


def for_cpu(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line for the CPU, and a line for each flag of it that was dropped or changed.

    Args:
        argv: Megatron's flags.
    """
    given = {flag for flag, _ in by_flag(argv, Problems())}
    dropped = [flag for flag in _DROPPED if flag in given]
    said = [f"hetermoe: {flag} is dropped on the CPU: {_DROPPED[flag]}" for flag in dropped]
    extra = [flag for flag in _OFF if flag not in given]
    for flag, (asked, instead, reason) in _REPLACED.items():
        if flag not in given or value_of(argv, flag) == asked:
            extra += [flag, instead]
            if flag in given:
                said.append(f"hetermoe: {flag} {asked} is {instead} on the CPU: {reason}")
    return override(argv, extra, dropped), said
