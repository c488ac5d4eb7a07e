"""One GPU, or a few, as a mixed cluster, as `hetermoe train --emulate` makes it, for ranks that have command lines of their own."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_hetermoe.cli.emulate import gpu_to_divide
from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.runtime import seen_gpu
from megatron_hetermoe.runtime.mps import Service, defaults, share
from megatron_hetermoe.runtime.seen_gpu import LinearLayers

_PATH = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}"}


class Rank(NamedTuple):
    """A virtual GPU.

    Attributes:
        share: of the GPU, in percent.
        kernel: of attention, as ``--hetermoe-attention``.
        pool: name of its kind.
        gpu: which of the machine's it has the share of.
    """

    share: int
    kernel: str
    pool: str
    gpu: int = 0


class Ended(NamedTuple):
    """How the ranks ended: exit codes, None for one that had to be killed, and what each printed."""

    codes: list[int | None]
    logs: list[str]

    @property
    def failure(self) -> dict | None:
        """What went wrong, or None."""
        if all(code == 0 for code in self.codes):
            return None
        return {"failed": f"exit codes {self.codes}", "log": [log[-6000:] for log in self.logs]}


def run(
    ranks: Sequence[Rank], argv_of: Callable[[int], Sequence[object]], limit: float, blocks: int | None = None
) -> Ended:
    """Runs one Python process a rank, all at once, and waits for them.

    Args:
        ranks: the virtual GPUs.
        argv_of: a rank's words after ``python``.
        limit: seconds.
        blocks: the most that a communicator of NCCL may use on a GPU; all must fit beside each other. None takes as
            many as ``--emulate``.
    """
    gpus = _gpus(max(rank.gpu for rank in ranks) + 1)
    with tempfile.TemporaryDirectory() as name, Service(",".join(gpus), Path(name)) as service:
        folder = Path(name)
        environment = {
            **defaults(os.environ), "WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(20000 + hash(name) % 10000), "LOCAL_RANK": "0", "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "4", **os.environ, **service.variables,
            **_PATH,
        }
        if blocks:
            environment["NCCL_MAX_CTAS"] = str(blocks)
        logs = [folder / f"log.{rank}" for rank in range(len(ranks))]
        processes = [
            subprocess.Popen(
                [sys.executable, *map(str, argv_of(index))], stdout=logs[index].open("w"), stderr=subprocess.STDOUT,
                start_new_session=True, env={
                    **environment, "RANK": str(index), **share(rank.share), "CUDA_VISIBLE_DEVICES": gpus[rank.gpu]},
            )
            for index, rank in enumerate(ranks)
        ]
        return Ended(wait_for(processes, limit), [log.read_text() for log in logs])


def wait_for(processes: Sequence[subprocess.Popen], limit: float) -> list[int | None]:
    """The exit codes when all have ended or so many seconds are over, None for those that are killed then. Each leads a
    process group; whatever ends the wait, none is left."""
    end = time.monotonic() + limit
    codes: list[int | None] = []
    try:
        for process in processes:
            process.wait(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        codes = [process.poll() for process in processes]
        for process, code in zip(processes, codes):
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return codes


def wrong_shares(ranks: Sequence[Rank], layers: Sequence[LinearLayers]) -> list[str]:
    """The shares with which cuBLAS computes products of some layers wrongly, one sentence each."""
    gpus = _gpus(max(rank.gpu for rank in ranks) + 1)
    wrong = []
    with tempfile.TemporaryDirectory() as name, Service(",".join(gpus), Path(name)) as service:
        distinct = list({(rank.share, rank.gpu): rank for rank in ranks}.values())
        environments = [{**defaults(os.environ), **os.environ, **service.variables, **_PATH, **share(rank.share),
                         "CUDA_VISIBLE_DEVICES": gpus[rank.gpu]} for rank in distinct]
        for of_length in layers:
            for rank, found in zip(distinct, seen_gpu.seen(environments, of_length)):
                if said := found.problem or ", ".join(found.wrong_products):
                    wrong.append(f"with {rank.share}% ({found.multiprocessors} multiprocessors) products are wrong at "
                                 f"{of_length.rows} rows: {said}")
    return wrong


@functools.cache
def _gpus(count: int) -> tuple[str, ...]:
    """Names in CUDA_VISIBLE_DEVICES of the machine's first GPUs, when ranks can share them."""
    problems = Problems()
    # Without an order of its own CUDA has the fastest first.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]
    if len(visible) < count:
        problems.add(f"ranks are on {count} GPUs, and CUDA_VISIBLE_DEVICES names {len(visible)}")
    found = [gpu_to_divide({**os.environ, **_PATH, "CUDA_VISIBLE_DEVICES": name}, problems).uuid for name in visible]
    problems.raise_if_any()
    return tuple(found)
