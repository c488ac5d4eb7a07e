"""What a rank would see of GPU and NCCL, asked of a process that ends: the one that starts ranks must not hold a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

_LIMIT = 120  # seconds; torch comes from a slow disk sometimes


@dataclass(frozen=True)
class SeenGpu:
    """The first GPU that a process sees.

    Attributes:
        name: its kind; empty without a GPU.
        uuid: as CUDA_VISIBLE_DEVICES takes it.
        capability: compute capability, as (9, 0).
        multiprocessors: that this process may use.
        nccl: version of the NCCL that is loaded; empty without.
        nccl_file: where it was loaded from.
        problem: what CUDA said, where it failed.
    """

    name: str = ""
    uuid: str = ""
    capability: tuple[int, ...] = ()
    multiprocessors: int = 0
    nccl: tuple[int, ...] = ()
    nccl_file: str = ""
    problem: str = ""


def seen(environments: Sequence[Mapping[str, str]]) -> list[SeenGpu]:
    """What processes with these environments see, all at once."""
    processes = [
        subprocess.Popen([sys.executable, "-m", __name__], env=dict(environment), stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for environment in environments
    ]
    try:
        return [_answer(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _answer(process: subprocess.Popen[str]) -> SeenGpu:
    try:
        output, errors = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        return SeenGpu(problem=f"CUDA did not answer within {_LIMIT} s")
    if process.returncode:
        return SeenGpu(problem=(errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    document = json.loads(output.splitlines()[-1])
    return SeenGpu(**{**document, "capability": tuple(document["capability"]), "nccl": tuple(document["nccl"])})


def _look() -> SeenGpu:
    import torch

    from megatron_hetermoe.runtime.nccl import loaded_nccl

    nccl = dict(zip(("nccl", "nccl_file"), loaded_nccl()))
    try:
        torch.zeros(1, device="cuda").item()  # a GPU that is taken, or a service that does not answer, says so here
        properties = torch.cuda.get_device_properties(0)
    except (RuntimeError, AssertionError) as error:
        return SeenGpu(problem=" ".join(str(error).split()), **nccl)
    return SeenGpu(properties.name, f"GPU-{properties.uuid}", (properties.major, properties.minor),
                   properties.multi_processor_count, **nccl)


if __name__ == "__main__":
    print(json.dumps(asdict(_look())))
