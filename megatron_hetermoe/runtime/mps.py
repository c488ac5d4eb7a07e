"""Several ranks on one GPU: NVIDIA's Multi-Process Service for one run, and what ranks need in their environment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.runtime import mps_keeper

LOGS = ("control.log", "server.log")  # the service's own
_END = 180  # seconds; the keeper gives up before

# Unless the user says otherwise: NCCL takes ranks that share a GPU, whose blocks must fit on a small share beside each
# other (by default they did not, on 18 multiprocessors) and for which it has no multicast; streams have queues of their own.
DEFAULTS = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2", "CUDA_DEVICE_MAX_CONNECTIONS": "16",
}


def share(percent: int) -> dict[str, str]:
    """What gives a process so much of the GPU, in percent, once it has the variables of a Service."""
    return {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent)}


def defaults(given: Mapping[str, str]) -> dict[str, str]:
    """DEFAULTS that an environment does not have."""
    return {name: value for name, value in DEFAULTS.items() if name not in given}


class Service:
    """The service, from entering to leaving. It is a context manager; ranks have ended before it is left.

    It listens in a folder of its own, so another one that the user runs is left alone, and one that earlier ranks died in,
    which may call the GPU busy for a while, is not met. A process of its own keeps it (``mps_keeper``), so it ends with this
    process, also when that is killed.

    Args:
        gpu: its name in CUDA_VISIBLE_DEVICES, for the service and for ranks alike: an UUID, for the service numbers the
            devices that it sees anew.
        logs: folder for LOGS; those of an earlier run are removed.
    """

    def __init__(self, gpu: str, logs: Path):
        self._gpu = gpu
        self._logs = logs.resolve()
        self._keeper: subprocess.Popen[str] | None = None
        self.variables: dict[str, str] = {}  # lead a process to the service; made by entering

    def __enter__(self) -> Service:
        self._logs.mkdir(parents=True, exist_ok=True)
        for name in LOGS:
            (self._logs / name).unlink(missing_ok=True)
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", mps_keeper.__file__, self._gpu, str(self._logs)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )
        try:
            said = json.loads(self._keeper.stdout.readline() or '{"failed": "its keeper ended"}')
            if "failed" in said:
                raise UsageError([f"the Multi-Process Service does not start: {said['failed']}{self._last_line()}"])
        except BaseException:
            self._end()
            raise
        self.variables = {**mps_keeper.variables(said["folder"], str(self._logs)), "CUDA_VISIBLE_DEVICES": self._gpu}
        return self

    def __exit__(self, *exception: object) -> None:
        if self._end():
            print("hetermoe: the Multi-Process Service did not end when it was told to, and was killed", file=sys.stderr)

    def _end(self) -> int:
        """Has the keeper end the service and waits for it; returns its exit code."""
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        return self._keeper.wait(_END)

    def _last_line(self) -> str:
        """What the service logged last, as the end of a sentence."""
        for name in LOGS:
            path = self._logs / name
            if path.exists() and (lines := path.read_text(errors="replace").strip().splitlines()):
                return f" ({path}: {lines[-1].strip()})"
        return ""
