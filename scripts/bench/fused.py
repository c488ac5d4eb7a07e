"""``fused.py WORDS...`` is ``hetermoe WORDS...`` with an optimizer step of one kernel.

Recipes have that by transformer-engine or apex; where neither is installed Megatron takes torch's, which reads and writes
all of an optimizer's state seven times. Ranks of a benchmark, stock Megatron's too, take torch's fused one.
"""

from __future__ import annotations

import sys
from functools import partial

import megatron.core.optimizer
import torch

from megatron_hetermoe.cli.main import main


def fuse_adam() -> None:
    """From here on Megatron's Adam is torch's fused AdamW."""
    megatron.core.optimizer.Adam = partial(torch.optim.AdamW, fused=True)


if __name__ == "__main__":
    fuse_adam()
    sys.exit(main())
