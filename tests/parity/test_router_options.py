"""Every option of Megatron's router, each beside other options of the model that could break it."""

from __future__ import annotations

import pytest

UNGATED = {"swiglu": None, "no_bias_gelu_fusion": True}


def test_sigmoid_scores_with_expert_bias(parity):
    """The bias moves by the tokens of all attention ranks; QK norm, learned positions and squared ReLU beside it."""
    parity.check(
        2, 2, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.01,
        moe_router_load_balancing_type="seq_aux_loss", moe_router_dtype="fp32", qk_layernorm=True, add_qkv_bias=True,
        squared_relu=True, position_embedding_type="learned_absolute", normalization="LayerNorm",
        use_distributed_optimizer=True, weight_decay=0.1, calculate_per_token_loss=True, **UNGATED,
    )


@pytest.mark.slow
def test_sinkhorn(parity):
    """Top 1, with SGD, weight decay, no positions and plain GELU."""
    parity.check(
        2, 1, moe_router_load_balancing_type="sinkhorn", moe_router_topk=1, moe_router_pre_softmax=True,
        moe_aux_loss_coeff=0, optimizer="sgd", sgd_momentum=0.9, weight_decay=0.1, lr=1e-2,
        position_embedding_type="none", **UNGATED,
    )


@pytest.mark.slow
def test_group_limited_routing_with_global_aux_loss(parity):
    parity.check(
        2, 2, moe_router_num_groups=4, moe_router_group_topk=2, moe_router_pre_softmax=True,
        moe_router_topk_scaling_factor=2.5, moe_router_load_balancing_type="global_aux_loss", moe_router_dtype="fp64",
    )


@pytest.mark.slow
def test_several_aux_losses(parity):
    parity.check(
        1, 1, 2, moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[0.1, 0.1, 0.1], moe_per_layer_logging=True, moe_z_loss_coeff=0.01,
    )


@pytest.mark.slow
def test_quantile_balancing(parity):
    parity.check(2, 1, moe_router_load_balancing_type="quantile_balancing", moe_aux_loss_coeff=0)
