"""Whether Megatron's small functions are compiled: not on Volta, nor where ``--disable-jit-fuser`` is given.

Megatron decorates activations, norms and parts of the router with torch.compile as it is imported, which is before it has
read its flags. So what the flag asks for is asked of torch, and before that import. Nothing here imports
Megatron.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

SWITCH = "TORCHDYNAMO_DISABLE"  # torch.compile then returns functions as they are
_FLAG = "--disable-jit-fuser"
_COMPILED_FROM = (7, 5)  # Turing


def choose(argv: Sequence[str], capability: tuple[int, int]) -> str:
    """Switches torch's compiler off, unless the environment says which way it is to be.

    Args:
        argv: Megatron's flags.
        capability: of this rank's GPU.

    Returns:
        why, if no flag asked for it and it was done; else "".
    """
    if SWITCH in os.environ or not (_FLAG in argv or capability < _COMPILED_FROM):
        return ""
    os.environ[SWITCH] = "1"
    return "" if _FLAG in argv else f"this GPU has compute capability {capability[0]}.{capability[1]}"


def capability_here() -> tuple[int, int]:
    """The compute capability of this rank's GPU."""
    import torch

    return torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
