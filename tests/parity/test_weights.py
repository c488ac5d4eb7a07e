"""Gradients of weights in tasks of their own: the same sums in the same order, so the same training."""

from __future__ import annotations

import pytest
from parity_cases import placement_file
from ranks import assert_same_steps
from test_gradients import squares

DELAYED = ["--hetermoe-weight-gradients", "delayed"]
MIXED = {1: {"a0": [0, 5], "e0": [1, 2, 3], "e1": [4, 6, 7]}, 2: {"e1": ["0-7"]}}


@pytest.mark.parametrize(
    "layout, hetermoe, model",
    [
        pytest.param((2, 2, 1), ["--hetermoe-experts", "sequential"], {}, marks=pytest.mark.slow),
        ((1, 1, 2), ["--hetermoe-experts", "grouped", "--hetermoe-wave", "2"],
         {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
          "ddp_bucket_size": 2000, "add_qkv_bias": True, "moe_shared_expert_intermediate_size": 32}),
        ((2, 1, 1), ["--hetermoe-schedule", "sequential"],
         {"untie_embeddings_and_output_weights": None, "overlap_grad_reduce": True, "num_layers": 3,
          "moe_layer_freq": "[0,1,1]", "ffn_hidden_size": 64, "recompute_granularity": "full",
          "recompute_method": "block", "recompute_num_layers": 2, "eval_interval": 10, "eval_iters": 2}),
    ],
    ids=["plain", "distributed", "tied"],
)
def test_same_training(parity, layout, hetermoe, model):
    parity.check(*layout, hetermoe=[*DELAYED, *hetermoe], **model)


@pytest.mark.parametrize("kernel", ["sequential", "grouped"])
def test_every_parameters_gradient(parity, kernel):
    placement = placement_file(parity, experts=8, layers=MIXED)
    theirs = squares(parity.stock(2, train_iters=1).gradients, 1)
    run = parity.disaggregated(
        2, 2, 1, [*DELAYED, "--hetermoe-experts", kernel, "--hetermoe-placement", placement], train_iters=1
    )
    assert squares(run.gradients, 1) == pytest.approx(theirs, rel=1e-5)


def test_bit_equal_to_training_without_them(parity):
    placement = ["--hetermoe-placement", placement_file(parity, experts=8, layers=MIXED)]
    model = {"bf16": True, "train_iters": 5}
    together = parity.disaggregated(2, 2, 1, placement, **model)
    delayed = parity.disaggregated(2, 2, 1, [*DELAYED, *placement], **model)
    for rank in range(4):
        assert_same_steps(delayed.steps[rank], together.steps[rank])
