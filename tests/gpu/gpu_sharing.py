"""Several ranks on one GPU, each with all of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hetermoe.runtime import mps


@contextmanager
def sharing(gpu: str, logs: Path) -> Iterator[dict[str, str]]:
    """The environment of ranks that share the GPU, each with all of it. Without the service they have it in turns, and NCCL,
    whose kernels wait for each other, comes to no end."""
    with mps.Service(gpu, logs) as service:
        yield {**mps.defaults(os.environ), **service.variables}
