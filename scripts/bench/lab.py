"""One GPU as a mixed cluster: ranks with shares of it, by the Multi-Process Service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Rank(NamedTuple):
    """A virtual GPU.

    Attributes:
        share: of the GPU, in percent.
        kernel: of attention, as ``--hetermoe-attention``.
        pool: name of its kind.
    """

    share: int
    kernel: str
    pool: str


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

    The service is started for them alone, on a pipe of its own: after a rank was killed it may call the GPU busy for a
    while.

    Args:
        ranks: the virtual GPUs.
        argv_of: a rank's words after ``python``.
        limit: seconds.
        blocks: the most that a communicator of NCCL may use on a GPU; all must fit beside each other. None leaves it to
            the program.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0",
            "CUDA_DEVICE_MAX_CONNECTIONS": "16", "WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(20000 + hash(name) % 10000), "LOCAL_RANK": "0", "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "4", **os.environ,
            "CUDA_MPS_PIPE_DIRECTORY": str(folder / "mps"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "mps-log"),
        }
        if blocks:
            environment["NCCL_MAX_CTAS"] = str(blocks)
        environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
        for variable in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
            Path(environment[variable]).mkdir()
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, check=True)
        logs = [folder / f"log.{rank}" for rank in range(len(ranks))]
        processes = [
            subprocess.Popen(
                [sys.executable, *map(str, argv_of(index))], stdout=logs[index].open("w"), stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**environment, "RANK": str(index), "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(rank.share)},
            )
            for index, rank in enumerate(ranks)
        ]
        codes: list[int | None] = []
        try:
            for process in processes:
                codes.append(process.wait(timeout=limit))
        except subprocess.TimeoutExpired:
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            subprocess.run(["nvidia-cuda-mps-control"], input="quit\n", text=True, env=environment, timeout=60)
        return Ended(codes, [log.read_text() for log in logs])
