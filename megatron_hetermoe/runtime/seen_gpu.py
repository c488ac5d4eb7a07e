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
        wrong_products: those of matrices, as shapes, that come out wrong there, where that was asked.
        problem: what CUDA said, where it failed.
    """

    name: str = ""
    uuid: str = ""
    capability: tuple[int, ...] = ()
    multiprocessors: int = 0
    nccl: tuple[int, ...] = ()
    nccl_file: str = ""
    wrong_products: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class LinearLayers:
    """Layers whose products are looked at.

    Attributes:
        dtype: as torch names it.
        rows: that go through them at once.
        hidden: width of what goes in.
        widths: of what comes out, one a layer.
    """

    dtype: str
    rows: int
    hidden: int
    widths: tuple[int, ...]


def seen(environments: Sequence[Mapping[str, str]], layers: LinearLayers | None = None) -> list[SeenGpu]:
    """What processes with these environments see, all at once.

    Args:
        environments: of the processes.
        layers: whose products are to be checked.
    """
    words = [json.dumps(asdict(layers))] if layers else []
    processes = [
        subprocess.Popen([sys.executable, "-m", __name__, *words], env=dict(environment), stdin=subprocess.DEVNULL,
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
    return SeenGpu(**{name: tuple(value) if isinstance(value, list) else value for name, value in document.items()})


def _look(layers: LinearLayers | None = None) -> SeenGpu:
    import torch

    from megatron_hetermoe.runtime.nccl import loaded_nccl
    from megatron_hetermoe.runtime.products import wrong_products

    nccl = dict(zip(("nccl", "nccl_file"), loaded_nccl()))
    try:
        torch.zeros(1, device="cuda").item()  # a GPU that is taken, or a service that does not answer, says so here
        properties = torch.cuda.get_device_properties(0)
        wrong = wrong_products(layers, torch.device("cuda")) if layers else ()
    except (RuntimeError, AssertionError) as error:
        return SeenGpu(problem=" ".join(str(error).split()), **nccl)
    return SeenGpu(properties.name, f"GPU-{properties.uuid}", (properties.major, properties.minor),
                   properties.multi_processor_count, wrong_products=tuple(wrong), **nccl)


if __name__ == "__main__":
    print(json.dumps(asdict(_look(*(LinearLayers(**json.loads(word)) for word in sys.argv[1:])))))
