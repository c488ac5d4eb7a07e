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


def test_sinkhorn(parity):
    """Top 1, with SGD, weight decay, no positions and plain GELU."""
    parity.check(
        2, 1, moe_router_load_balancing_type="sinkhorn", moe_router_topk=1, moe_router_pre_softmax=True,
        moe_aux_loss_coeff=0, optimizer="sgd", sgd_momentum=0.9, weight_decay=0.1, lr=1e-2,
        position_embedding_type="none", **UNGATED,
    )


def test_group_limited_routing_with_global_aux_loss(parity):
    parity.check(
        2, 2, moe_router_num_groups=4, moe_router_group_topk=2, moe_router_pre_softmax=True,
        moe_router_topk_scaling_factor=2.5, moe_router_load_balancing_type="global_aux_loss", moe_router_dtype="fp64",
    )


def test_several_aux_losses(parity):
    parity.check(
        1, 1, 2, moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[0.1, 0.1, 0.1], moe_per_layer_logging=True, moe_z_loss_coeff=0.01,
    )


def test_quantile_balancing(parity):
    parity.check(2, 1, moe_router_load_balancing_type="quantile_balancing", moe_aux_loss_coeff=0)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_dropping_tokens_over_capacity(parity, policy):
    parity.check(1, 1, 2, moe_expert_capacity_factor=1.0, moe_token_drop_policy=policy, moe_router_dtype="fp32")


def test_padding_to_capacity_and_norms_for_the_log(parity):
    """Holders of 3, 3 and 2 experts. The norms and zeros that are logged are those of both pools together."""
    model = {
        "moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True, "log_params_norm": True,
        "moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True, "log_num_zeros_in_grad": True,
    }
    run = parity.check(2, 3, **model)
    reference = parity.stock(2, **model)
    assert len(reference.params_norms[0]) == 20
    for steps, norms in zip(run.steps, run.params_norms):
        assert norms == pytest.approx(reference.params_norms[0], rel=1e-6)
        assert [step.num_zeros for step in steps] == pytest.approx([step.num_zeros for step in reference.steps[0]], 0.02)


def test_probabilities_on_the_experts_input(parity):
    """Top 1, so that the order of the product with the router's probability is free; with a gated quick GELU."""
    parity.check(
        2, 2, moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_pre_softmax=True, swiglu=None,
        quick_geglu=True, no_bias_gelu_fusion=True,
    )


def test_jitter_and_dropout(parity):
    """One microbatch at a time, random numbers are drawn in stock Megatron's order."""
    parity.check(
        2, 2, hetermoe=["--hetermoe-schedule", "sequential"], moe_input_jitter_eps=0.05, attention_dropout=0.1,
        hidden_dropout=0.1,
    )
