"""The CPU's answers to what Megatron asks of CUDA. In a rank each time: install() changes torch for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from ranks import run_function


def _devices(rank: int, world: int) -> list[str]:
    import torch

    made = [
        torch.zeros(2, device="cuda"),
        torch.arange(3, device=torch.cuda.current_device()),
        torch.tensor([1], device="cpu", pin_memory=True),
        torch.tensor([1], device=torch.device("cuda", torch.cuda.current_device())),
        torch.empty_like(torch.ones(2), device=f"cuda:{torch.cuda.current_device()}"),
        torch.ones(2).new_zeros(3, device="cuda"),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(0),
        torch.ones(2).to(device=torch.device("cuda")),
        torch.ones(2).cuda(non_blocking=True),
        torch.nn.Linear(2, 2, device="cuda").weight,
        torch.nn.Linear(2, 2).cuda().weight,
        torch.nn.Linear(2, 2).to("cuda").weight,
    ]
    return [tensor.device.type for tensor in made]


def test_everything_lands_on_the_cpu():
    (devices,) = run_function(_devices, 1)
    assert devices == ["cpu"] * len(devices)


def _types(rank: int, world: int) -> list:
    import torch

    tensor = torch.ones(2)
    converted = tensor.to(torch.float64)
    names = [tensor.type(), tensor.half().type(), tensor.bfloat16().type()]
    return [*names, tensor.type(torch.int64).dtype == torch.int64, converted.dtype == torch.float64]


def test_types_are_named_as_on_a_gpu():
    (names,) = run_function(_types, 1)
    assert names == ["torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor", True, True]


def _random(rank: int, world: int) -> list[bool]:
    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def draw():
        return torch.rand(4, device="cuda")

    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = draw()
    torch.cuda.set_rng_state(state)
    again = draw()
    tracker = CudaRNGStatesTracker()
    tracker.add("expert", 11)
    outside = torch.cuda.get_rng_state()
    with tracker.fork("expert"):
        one = draw()
    untouched = torch.equal(outside, torch.cuda.get_rng_state())
    with tracker.fork("expert"):
        two = draw()
    torch.cuda.manual_seed(11)
    same_stream = torch.equal(draw(), one) and torch.equal(draw(), two)
    return [torch.equal(first, again), untouched, same_stream]


def test_random_states_are_kept_apart():
    (results,) = run_function(_random, 1)
    assert results == [True, True, True]


def _streams(rank: int, world: int) -> tuple[bool, float]:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        value = torch.ones(2, device="cuda") * 2
    event = side.record_event()
    torch.cuda.current_stream().wait_event(event)
    value.record_stream(side)
    torch.cuda.synchronize()
    end.record()
    with torch.cuda.nvtx.range("a range"):
        pass
    return event.query() and value.sum().item() == 4, start.elapsed_time(end)


def test_streams_and_events_do_nothing():
    ((right, milliseconds),) = run_function(_streams, 1)
    assert right
    assert 0 <= milliseconds < 10_000


def _megatron(rank: int, world: int) -> list[bool]:
    import numpy
    import torch
    from megatron.core.datasets.utils import compile_helpers
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    compile_helpers()  # exits when it does not find a Makefile
    splits = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization="RMSNorm",
        sequence_parallel=True,
        tensor_model_parallel_size=2,
        pipeline_dtype=torch.float32,
    )
    norm = WrappedTorchNorm(config, 8)
    plain = torch.nn.RMSNorm(8)
    return [
        isinstance(splits, numpy.ndarray),
        norm.weight.sequence_parallel,
        config.sequence_parallel,
        not hasattr(plain.weight, "sequence_parallel"),
        CheckpointWithoutOutput().fp8 is False,
    ]


def test_megatron_is_adjusted():
    (results,) = run_function(_megatron, 1)
    assert all(results), results


def _again(rank: int, world: int) -> bool:
    import torch
    from megatron_hetermoe.mcore.platform import cpu

    before = torch.zeros, torch.Tensor.to, torch.cuda.Stream
    cpu.install()
    return before == (torch.zeros, torch.Tensor.to, torch.cuda.Stream)


def test_installing_twice_changes_nothing():
    assert run_function(_again, 1) == [True]


@pytest.mark.parametrize("asked, expected", [("cpu", "True False"), ("", "{} True")])
def test_needed(asked, expected):
    """HETERMOE_PLATFORM decides without importing torch; without it the presence of a GPU does."""
    code = (
        "import sys; from megatron_hetermoe.mcore.platform import cpu;"
        "print(cpu.needed(), 'torch' in sys.modules)"
    )
    environment = {**os.environ, "HETERMOE_PLATFORM": asked}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    import torch

    assert done.stdout.strip() == expected.format(not torch.cuda.is_available())


def test_install_comes_before_megatron():
    code = (
        "import sys, types; sys.modules['megatron.core'] = types.ModuleType('megatron.core');"
        "from megatron_hetermoe.mcore.platform import cpu; cpu.install()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "comes before the first import" in done.stderr
