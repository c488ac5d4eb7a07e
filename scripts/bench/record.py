"""What a rank of a benchmark writes of its training steps, a line for each."""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from busy import Kernel, busy_seconds, kernels_of
from megatron.training import training


def record_steps(path: Path, timed: int, after_step: Callable[[], None]) -> None:
    """Writes a line for each training step.

    A step that is timed has ``seconds`` with the device idle before and after, ``tasks``, the seconds until the optimizer begins,
    ``loss`` and ``memory`` in bytes. A step after those has, under ``profiled``, its ``seconds`` until the optimizer begins, those
    in which the GPU did ``compute``, and those in which kernels of ``nccl`` ran.

    Args:
        path: of the file.
        timed: steps that are timed; those that follow are profiled.
        after_step: called after each, with the device idle.
    """
    file = path.open("w", buffering=1, encoding="utf-8")
    original = training.train_step
    signature = inspect.signature(original)
    steps = 0

    @functools.wraps(original)
    def train_step(*args, **kwargs):
        nonlocal steps
        steps += 1
        optimizer = signature.bind(*args, **kwargs).arguments["optimizer"]
        run = functools.partial(original, *args, **kwargs)
        result = (_timed if steps <= timed else _profiled)(run, optimizer, file)
        after_step()
        return result

    training.train_step = train_step


def _timed(run: Callable[[], tuple], optimizer: Any, file: TextIO) -> tuple:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    result = _before_optimizer(run, optimizer, end.record)
    torch.cuda.synchronize()
    loss = result[0].get("lm loss")
    file.write(json.dumps({
        "seconds": time.perf_counter() - start, "tasks": begin.elapsed_time(end) / 1e3,
        "loss": None if loss is None else float(loss), "memory": torch.cuda.max_memory_reserved(),
    }) + "\n")
    return result


def _profiled(run: Callable[[], tuple], optimizer: Any, file: TextIO) -> tuple:
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    ended: list[float] = []

    def stop() -> None:
        torch.cuda.synchronize()
        ended.append(time.perf_counter())
        profiler.stop()

    profiler.start()
    torch.distributed.barrier()  # starting it takes some ranks longer than others, which would count as waiting
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = _before_optimizer(run, optimizer, stop)
    torch.cuda.synchronize()
    file.write(json.dumps({"profiled": {"seconds": ended[0] - start, **busy_seconds(_kernels(profiler))}}) + "\n")
    return result


def _kernels(profiler: torch.profiler.profile) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        return kernels_of(json.loads(trace.read_text()))


def _before_optimizer(run: Callable[[], tuple], optimizer: Any, then: Callable[[], None]) -> tuple:
    """Trains a step; ``then`` is called where the optimizer begins."""
    step = optimizer.step

    def after() -> Any:
        then()
        return step()

    optimizer.step = after
    try:
        return run()
    finally:
        optimizer.step = step
