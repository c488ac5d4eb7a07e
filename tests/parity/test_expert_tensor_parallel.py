"""Experts that several expert ranks share, against stock Megatron with whole experts."""

from __future__ import annotations

import pytest
from parity_cases import placement_file

SHARED = {"expert_tensor_parallel_size": 2}


@pytest.mark.parametrize(
    "m, n, g, batch",
    [pytest.param(2, 2, 1, 8, marks=pytest.mark.slow), (1, 4, 1, 4), pytest.param(3, 2, 2, 12, marks=pytest.mark.slow)],
)
def test_layout(parity, m, n, g, batch):
    parity.check(m, n, g, global_batch_size=batch, **SHARED)


@pytest.mark.slow
def test_beside_tensor_parallelism_of_attention(parity):
    """Three ranks share an expert, two attention ranks that share a microbatch; fp16 and the distributed optimizer.

    What the parts of an expert make of a token is rounded to fp16 before it is summed.
    """
    parity.check(
        2, 3, rel=1e-3, global_batch_size=4, expert_tensor_parallel_size=3, moe_ffn_hidden_size=48, tensor_model_parallel_size=2,
        sequence_parallel=True, fp16=True, loss_scale=1024, use_distributed_optimizer=True, overlap_grad_reduce=True,
    )


@pytest.mark.slow
def test_uneven_holders(parity):
    """Experts as grouped products. One of two holders has no experts in a layer; two waves, experts run again, top 1, GELU."""
    placement = placement_file(
        parity, experts=8, layers={1: {"e0": [0, 1, 2, 3, 5], "e1": [4, 6, 7]}, 2: {"e1": ["0-7"]}}
    )
    parity.check(
        2, 4, hetermoe=["--hetermoe-placement", placement, "--hetermoe-wave", "2", "--hetermoe-experts", "grouped"], recompute_granularity="full",
        recompute_method="uniform", recompute_num_layers=1, moe_router_topk=1, moe_router_pre_softmax=True, swiglu=None,
        calculate_per_token_loss=True, clip_grad=0.1, **SHARED,
    )


@pytest.mark.slow
def test_zeros_in_gradients(parity):
    """Each part of an expert's gradient is counted once."""
    reference = parity.stock(2, log_num_zeros_in_grad=True)
    run = parity.disaggregated(2, 2, log_num_zeros_in_grad=True, **SHARED)
    for steps in run.steps:
        assert [step.num_zeros for step in steps] == pytest.approx([step.num_zeros for step in reference.steps[0]], 0.02)
    assert reference.steps[0][0].num_zeros > 0
