"""What GPUs cannot do of a plan, which no machine of the tests has."""

from __future__ import annotations

import os

from models import tiny
from ranks import run_function

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import Flags
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.topology.order import Started

SHAPE = ModelShape(
    layers=1, moe_layers=(1,), experts=4, topk=2, hidden=64, expert_ffn=64, dense_ffn=64, shared_expert_ffn=0, gated=True,
    heads=4, query_groups=4, head_dim=16, tied_embeddings=False, sequence=32,
)
VOLTA, AMPERE, HOPPER = 7.0, 8.0, 9.0


def _problems(rank: int, world: int, cases: list) -> list[list[str]]:
    from megatron_hetermoe.mcore.devices import device_problems

    return [
        device_problems(plan, biases, "local", {one: Started(capability=number) for one, number in capabilities.items()})
        for plan, biases, capabilities in cases
    ]


def plan(attention: str, experts: str, kernel: str = "auto", holders=(2, 2, 3, 3)) -> Plan:
    """Two attention and two expert ranks."""
    return Plan(SHAPE, 2, 2, 1, (holders,), attention_precision=attention, expert_precision=experts, expert_kernel=kernel)


def test_what_is_said():
    mixed = {0: HOPPER, 1: HOPPER, 2: VOLTA, 3: VOLTA}
    cases = [
        (plan("bf16", "bf16"), False, mixed),
        (plan("bf16", "fp16"), False, mixed),
        (plan("bf16", "bf16", holders=(2, 2, 2, 2)), False, mixed),
        (plan("bf16", "fp16"), False, {0: VOLTA}),
        (plan("fp16", "fp16"), False, {0: VOLTA, 2: VOLTA}),
        (plan("bf16", "bf16"), False, dict.fromkeys(range(4), 0.0)),
        (plan("bf16", "bf16", "grouped"), False, {0: VOLTA, 2: HOPPER, 3: AMPERE}),
        (plan("bf16", "fp16", "grouped"), False, {2: HOPPER}),
        (plan("bf16", "bf16", "grouped"), True, {2: HOPPER}),
        (plan("fp32", "fp32", "grouped"), False, dict.fromkeys(range(4), 0.0)),
    ]
    [found] = run_function(_problems, 1, cases)
    without, both, one, attention, fp16, cpu, ampere, half, biases, forced_cpu = found
    assert [line.split(" has ")[0] for line in without] == ["rank 2", "rank 3"]
    assert all("add --hetermoe-expert-precision fp16" in line for line in without)
    assert not both and not fp16 and not cpu and not forced_cpu
    assert [line.split(" has ")[0] for line in one] == ["rank 2"], "rank 3 holds no expert"
    assert len(attention) == 1 and "rank 0 has a GPU without bf16 (compute capability 7.0)" in attention[0]
    assert "train with --fp16" in attention[0]
    assert [line.split(": ")[0] for line in ampere] == [
        "rank 0 has a GPU without bf16 (compute capability 7.0) for attention in bf16",
        "--hetermoe-experts grouped cannot be on rank 3"]
    assert "experts are in fp16" in half[0] and "--disable-bias-linear" in biases[0]


def _profiled(rank: int, world: int, rest: list[str]) -> list[str]:
    """What ``hetermoe profile`` says on a V100."""
    from megatron_hetermoe.mcore import profiler

    os.environ["WORLD_SIZE"] = "3"
    profiler.started_here = lambda has_gpu, local_rank, engine: Started(capability=VOLTA, engine=engine)
    try:
        profiler.arguments(rest, Flags(enabled=True), Problems())
    except UsageError as error:
        return list(error.problems)
    return []


def test_a_gpu_is_not_profiled_in_a_precision_that_it_lacks():
    [found] = run_function(_profiled, 1, tiny(bf16=True))
    assert len(found) == 1 and "without bf16 (compute capability 7.0) for attention in bf16: train with --fp16" in found[0]
    assert run_function(_profiled, 1, tiny(fp16=True)) == [[]]
