"""Experts as grouped matrix products, which torch runs on a CPU too, against stock Megatron's, one after the other."""

from __future__ import annotations

import pytest
from parity_cases import placement_file
from test_gradients import squares

GROUPED = ["--hetermoe-experts", "grouped"]


@pytest.mark.parametrize(
    "layout, model",
    [
        pytest.param((2, 2, 1), {}, marks=pytest.mark.slow),
        ((1, 1, 2), {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
                     "ddp_bucket_size": 2000}),
        pytest.param(
            (2, 1, 1), {"swiglu": None, "moe_router_topk": 1, "moe_router_pre_softmax": True, "num_experts": 16,
                        "recompute_granularity": "selective", "recompute_modules": "moe"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "distributed", "gelu"],
)
def test_same_training(parity, layout, model):
    """With experts that get no token: 16 of them share 32 tokens."""
    parity.check(*layout, hetermoe=GROUPED, **model)


@pytest.mark.parametrize("distributed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_parameters_gradient(parity, distributed):
    """Also of a holder without a token, and on attention ranks."""
    placement = placement_file(
        parity, experts=8, layers={1: {"a0": [0, 5], "e0": [1, 2, 3], "e1": [4, 6, 7]}, 2: {"e1": ["0-7"]}}
    )
    model = {"train_iters": 1, "use_distributed_optimizer": distributed}
    theirs = squares(parity.stock(2, **model).gradients, 1)
    run = parity.disaggregated(2, 2, 1, [*GROUPED, "--hetermoe-placement", placement], **model)
    assert squares(run.gradients, 1) == pytest.approx(theirs, rel=1e-5)
