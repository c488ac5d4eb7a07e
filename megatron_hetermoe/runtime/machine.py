"""What this process's machine is, and how fast ranks reach each other. The judgement is ``planner/diagnosis.py``'s."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_hetermoe.planner.diagnosis import Gpu, Machine, Transfer
from megatron_hetermoe.runtime.nccl import loaded_nccl
from megatron_hetermoe.topology.order import POOL_VARIABLE

PACKAGES = ("torch", "megatron-core", "megatron-hetermoe", "transformer-engine", "apex")
VARIABLES = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_VISIBLE_DEVICES", "HETERMOE_PLATFORM", "NCCL_SOCKET_IFNAME",
             "NCCL_IB_HCA", "GLOO_SOCKET_IFNAME", "CUDA_MPS_PIPE_DIRECTORY")
_WORK = 0.3  # seconds of work before a clock is read
_REPEATS = 3
_SIZES = {"nccl": 64 << 20, "gloo": 16 << 20}  # bytes of a measured transfer


def this_machine(rank: int, local_rank: int, sees_file: bool | None) -> Machine:
    """What this process sees.

    Args:
        rank, local_rank: the launcher's.
        sees_file: whether rank 0's file is where it should be; None when that was not looked at.
    """
    gpu, problem = _gpu(local_rank)
    return Machine(
        rank=rank,
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        pool=os.environ.get(POOL_VARIABLE, ""),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        cuda=torch.version.cuda or "",
        architectures=tuple(torch.cuda.get_arch_list()),
        nccl=".".join(map(str, loaded_nccl()[0])),
        gpu=gpu,
        gpu_problem=problem,
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        sees_file=sees_file,
    )


def measure(rank: int, pairs: Sequence[tuple[int, int]], on_gpu: bool) -> list[Transfer]:
    """Times a transfer for each pair of ranks, one pair after the other. All ranks of the process group call it.

    Args:
        rank: this one.
        pairs: sender and receiver.
        on_gpu: with tensors of the GPU; the process group can carry them.

    Returns:
        Those that this rank received.
    """
    backend = "nccl" if on_gpu else "gloo"
    tensor = torch.zeros(_SIZES[backend], dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    received = []
    for source, target in pairs:
        for is_timed in (False, True):  # the first makes the connection
            dist.barrier()
            if rank not in (source, target):
                continue
            start = time.perf_counter()
            for _ in range(_REPEATS):
                dist.send(tensor, target) if rank == source else dist.recv(tensor, source)
            if on_gpu:
                torch.cuda.synchronize()
            if is_timed and rank == target:
                seconds = (time.perf_counter() - start) / _REPEATS
                received.append(Transfer(source, target, tensor.numel() / seconds, backend))
    return received


def _gpu(local_rank: int) -> tuple[Gpu | None, str]:
    """The GPU, or why there is none where one should be."""
    if os.environ.get("HETERMOE_PLATFORM") == "cpu":
        return None, ""
    if not torch.cuda.is_available():
        if not glob.glob("/dev/nvidia[0-9]*"):
            return None, ""
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return None, " ".join(str(error).split())
        return None, "torch sees none, though the machine has one"
    device = local_rank % torch.cuda.device_count()
    try:
        torch.cuda.set_device(device)
        free, memory = torch.cuda.mem_get_info()  # before anything of this process is there but its context
    except RuntimeError as error:
        return None, " ".join(str(error).split())
    properties = torch.cuda.get_device_properties(device)
    driver, clock, highest = _ask_driver(str(properties.uuid))
    capability = properties.major, properties.minor
    return Gpu(properties.name, capability, memory, free, driver, clock, highest, str(properties.uuid)), ""


def _ask_driver(uuid: str) -> tuple[str, int, int]:
    """Driver's version, clock while the GPU works, highest clock, of nvidia-smi; empty and 0 where it does not say."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=driver_version,clocks.sm,clocks.max.sm",
               "--format=csv,noheader,nounits"]
    try:
        _work()
        driver, *clocks = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split(",")
        return driver.strip(), *(int(clock) if clock.strip().isdigit() else 0 for clock in clocks)
    except (OSError, subprocess.SubprocessError, ValueError, RuntimeError):
        return "", 0, 0


def _work() -> None:
    """Queues products of matrices for longer than nvidia-smi takes, so that it sees the GPU at work."""
    matrix = torch.zeros(4096, 4096, dtype=torch.float16, device="cuda")
    start = time.perf_counter()
    while time.perf_counter() - start < _WORK:
        torch.mm(matrix, matrix)
        torch.cuda.synchronize()
    for _ in range(2000):
        torch.mm(matrix, matrix)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_probe(folder: Path) -> Path:
    """A file for the other ranks to see. Its name is new, since a network file system remembers that one is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"hetermoe-probe-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    path.write_text("", encoding="ascii")
    return path
