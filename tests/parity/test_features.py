"""What recipes switch on, each beside a layout that could break it."""

from __future__ import annotations

import pytest
from ranks import assert_same_steps


@pytest.mark.slow
@pytest.mark.parametrize("topk", [1, 4])
def test_topk(parity, topk):
    parity.check(2, 2, moe_router_topk=topk, moe_router_pre_softmax=topk == 1)


def test_aux_loss_and_z_loss(parity):
    """Router losses strong enough to show in the gradients, and clipping below the usual norm."""
    run = parity.check(2, 1, moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.1, clip_grad=0.1)
    assert all(step.grad_norm > 0.1 for step in run.steps[0]), "clipping was never active"


@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 1, 2)])
def test_distributed_optimizer(parity, layout):
    parity.check(*layout, use_distributed_optimizer=True)


def test_overlapped_reduction_and_gather(parity):
    """Two waves: gradients of a layer may be reduced after the last microbatch of the last wave only."""
    parity.check(
        1, 1, 2, hetermoe=["--hetermoe-wave", "2"], use_distributed_optimizer=True, overlap_grad_reduce=True,
        overlap_param_gather=True, ddp_bucket_size=2000,
    )


@pytest.mark.slow
def test_tied_embeddings(parity):
    parity.check(2, 2, untie_embeddings_and_output_weights=None, overlap_grad_reduce=True)


@pytest.mark.slow
def test_per_token_loss(parity):
    parity.check(3, 2, global_batch_size=6, calculate_per_token_loss=True)


@pytest.mark.slow
def test_fp16_with_a_fixed_scale(parity):
    run = parity.check(2, 2, fp16=True, loss_scale=1024)
    assert {step.loss_scale for step in run.steps[-1]} == {1024.0}


@pytest.mark.slow
def test_fp16_overflow_skips_everywhere(parity):
    """A scale that overflows at first: all ranks skip the same steps and lower the scale together."""
    reference = parity.stock(2, fp16=True, initial_loss_scale=2.0**40, hysteresis=1, train_iters=30)
    run = parity.disaggregated(2, 2, fp16=True, initial_loss_scale=2.0**40, hysteresis=1, train_iters=30)
    skipped = [step.skipped for step in reference.steps[0]]
    assert 0 < sum(skipped) < len(skipped)
    for steps in run.steps:
        assert [step.skipped for step in steps] == skipped
        assert [step.loss_scale for step in steps] == [step.loss_scale for step in reference.steps[0]]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["[0,1,1]", "[1,0,1]", "[1,1,0]"])
def test_dense_layers(parity, pattern):
    """A dense layer first, between, and last, where Megatron's own nodes leave out the final norm."""
    parity.check(2, 2, num_layers=3, moe_layer_freq=pattern, ffn_hidden_size=64)


@pytest.mark.slow
def test_shared_expert(parity):
    parity.check(2, 2, moe_shared_expert_intermediate_size=32)


def test_evaluation(parity):
    """Losses on the validation set, during training and at its end, on ranks of both pools."""
    run = parity.check(2, 1, eval_interval=10, eval_iters=2)
    assert len(run.evals[0]) >= 2


@pytest.mark.slow
def test_zeros_in_gradients(parity):
    reference = parity.stock(2, log_num_zeros_in_grad=True)
    run = parity.disaggregated(2, 2, log_num_zeros_in_grad=True)
    for steps in run.steps:
        assert_same_steps(steps, reference.steps[0], rel=1e-5)
        assert [step.num_zeros for step in steps] == pytest.approx([step.num_zeros for step in reference.steps[0]], 0.02)
    assert reference.steps[0][0].num_zeros > 0


def test_torchs_attention(parity):
    """The same attention by scaled_dot_product_attention, with query groups."""
    parity.check(2, 1, hetermoe=["--hetermoe-attention", "flash"])
