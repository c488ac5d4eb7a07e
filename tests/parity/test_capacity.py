"""Tokens over an expert's capacity, and what else changes between router and experts."""

from __future__ import annotations

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_dropping_tokens_over_capacity(parity, policy):
    parity.check(1, 1, 2, moe_expert_capacity_factor=1.0, moe_token_drop_policy=policy, moe_router_dtype="fp32")


@pytest.mark.slow
def test_padding_to_capacity_and_norms_for_the_log(parity):
    """Holders of 3, 3 and 2 experts. The norms and zeros that are logged are those of both pools together."""
    model = {
        "moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True, "log_params_norm": True,
        "moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True, "log_num_zeros_in_grad": True,
    }
    run = parity.check(2, 3, **model)
    reference = parity.stock(2, **model)
    zeros = [step.num_zeros for step in reference.steps[0]]
    assert len(reference.params_norms[0]) == len(zeros) == 20
    for steps, norms in zip(run.steps, run.params_norms):
        assert norms == pytest.approx(reference.params_norms[0], rel=1e-6)
        assert [step.num_zeros for step in steps] == pytest.approx(zeros, 0.02)


def test_probabilities_on_the_experts_input(parity):
    """Top 1, so that the order of the product with the router's probability is free; with a gated quick GELU."""
    parity.check(
        2, 2, moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_pre_softmax=True, swiglu=None,
        quick_geglu=True, no_bias_gelu_fusion=True,
    )


@pytest.mark.slow
def test_jitter_and_dropout(parity):
    """One microbatch at a time, random numbers are drawn in stock Megatron's order."""
    parity.check(
        2, 2, hetermoe=["--hetermoe-schedule", "sequential"], moe_input_jitter_eps=0.05, attention_dropout=0.1,
        hidden_dropout=0.1,
    )
