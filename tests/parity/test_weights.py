"""Gradients of weights in tasks of their own: the same sums in the same order, so the same training. In one task for a wave:
other sums of the same numbers."""

from __future__ import annotations

import pytest
from parity_cases import placement_file
from ranks import assert_same_steps
from test_gradients import squares

DELAYED = ["--hetermoe-weight-gradients", "delayed"]
MERGED = ["--hetermoe-weight-gradients", "merged"]
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


FINE_BUCKETS = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
                "ddp_bucket_size": 2000}


@pytest.mark.parametrize(
    "layout, hetermoe, model",
    [
        # Waves of 2 and 3, experts on attention ranks, buckets that are reduced as soon as they are complete.
        ((2, 2, 1), ["--hetermoe-experts", "grouped", "--hetermoe-wave", "3", "MIXED"],
         {"global_batch_size": 10, **FINE_BUCKETS}),
        ((1, 1, 2), ["--hetermoe-experts", "sequential", "--hetermoe-schedule", "overlapped", "--hetermoe-wave", "2"],
         {"global_batch_size": 8, "overlap_grad_reduce": True}),
        # Ranks that share experts, beside ranks that share a microbatch.
        pytest.param((2, 2, 1), ["--hetermoe-experts", "grouped", "--hetermoe-wave", "2"],
                     {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
                     marks=pytest.mark.slow),
        pytest.param((2, 2, 2), ["--hetermoe-experts", "grouped", "MIXED"],
                     {"global_batch_size": 12, "recompute_granularity": "full", "recompute_method": "uniform",
                      "recompute_num_layers": 1, "calculate_per_token_loss": True, **FINE_BUCKETS}, marks=pytest.mark.slow),
        pytest.param((2, 1, 1), ["--hetermoe-schedule", "sequential"],
                     {"num_layers": 3, "moe_layer_freq": "[0,1,1]", "ffn_hidden_size": 64, "eval_interval": 4,
                      "eval_iters": 2}, marks=pytest.mark.slow),
    ],
    ids=["distributed", "overlapped", "shared", "recompute", "dense"],
)
def test_one_product_for_a_wave(parity, layout, hetermoe, model):
    if hetermoe[-1] == "MIXED":
        hetermoe = [*hetermoe[:-1], "--hetermoe-placement", placement_file(parity, experts=8, layers=MIXED)]
    parity.check(*layout, hetermoe=[*MERGED, *hetermoe], train_iters=8, **model)


@pytest.mark.parametrize(
    "how, kernel", [(DELAYED, "sequential"), (DELAYED, "grouped"), ([*MERGED, "--hetermoe-wave", "3"], "sequential"),
                    ([*MERGED, "--hetermoe-wave", "3"], "grouped")])
def test_every_parameters_gradient(parity, how, kernel):
    placement = placement_file(parity, experts=8, layers=MIXED)
    theirs = squares(parity.stock(2, train_iters=1).gradients, 1)
    run = parity.disaggregated(
        2, 2, 1, [*how, "--hetermoe-experts", kernel, "--hetermoe-placement", placement], train_iters=1
    )
    assert squares(run.gradients, 1) == pytest.approx(theirs, rel=1e-5)


def test_bit_equal_to_training_without_them(parity):
    placement = ["--hetermoe-placement", placement_file(parity, experts=8, layers=MIXED)]
    model = {"bf16": True, "train_iters": 5}
    together = parity.disaggregated(2, 2, 1, placement, **model)
    delayed = parity.disaggregated(2, 2, 1, [*DELAYED, *placement], **model)
    for rank in range(4):
        assert_same_steps(delayed.steps[rank], together.steps[rank])
