"""Tensor parallelism of attention ranks with sequence parallelism, against stock Megatron with the same.

Each option of a model, its router, the optimizer and recomputation stands beside it at least once, with others that
could disturb it; ranks that share experts are in ``test_expert_tensor_parallel``.
"""

from __future__ import annotations

import pytest
from parity_cases import placement_file

TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    "m, n, g, batch",
    [pytest.param(2, 1, 1, 4, marks=pytest.mark.slow), (4, 3, 1, 8), pytest.param(2, 2, 2, 8, marks=pytest.mark.slow)],
)
def test_layout(parity, m, n, g, batch):
    parity.check(m, n, g, global_batch_size=batch, **TENSOR)


@pytest.mark.parametrize(
    "model",
    [pytest.param({"add_qkv_bias": True, "use_distributed_optimizer": True, "overlap_grad_reduce": True,
                   "ddp_bucket_size": 2000}, marks=pytest.mark.slow),
     pytest.param({"num_layers": 3, "moe_layer_freq": "[0,1,1]", "ffn_hidden_size": 64, "untie_embeddings_and_output_weights": None,
                   "moe_shared_expert_intermediate_size": 32, "calculate_per_token_loss": True,
                   "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
                  marks=pytest.mark.slow)],
    ids=["distributed", "dense"])
def test_gradients_of_weights_later(parity, model):
    """Parts of a sequence are gathered again in the backward, for the product that is left."""
    parity.check(2, 2, hetermoe=["--hetermoe-weight-gradients", "delayed", "--hetermoe-wave", "2"], **model, **TENSOR)


@pytest.mark.slow
def test_experts_on_attention_ranks(parity):
    """They are whole there, and each of the two ranks that share a microbatch has its own."""
    placement = placement_file(
        parity, experts=8,
        layers={"all": {"e0": ["0-4"], "e1": ["5-7"]}, 2: {"a0": [0], "a1": [1, 2], "e0": [3, 4], "e1": ["5-7"]}},
    )
    parity.check(
        2, 2, hetermoe=["--hetermoe-placement", placement], num_layers=3, use_distributed_optimizer=True, **TENSOR
    )


@pytest.mark.slow
def test_router_losses(parity):
    """Weights of the router have gradients on all ranks that share a microbatch; per-token loss, top 4, active clip."""
    run = parity.check(
        4, 1, global_batch_size=4, moe_router_topk=4, moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.1, clip_grad=0.1,
        calculate_per_token_loss=True, **TENSOR,
    )
    assert all(step.grad_norm > 0.1 for step in run.steps[0]), "clipping was never active"


@pytest.mark.slow
def test_expert_bias(parity):
    """Tokens of both parts of a sequence count for its update; loss over the sequence, shared expert, tied embeddings."""
    parity.check(
        2, 2, global_batch_size=4, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.01, moe_router_load_balancing_type="seq_aux_loss",
        moe_shared_expert_intermediate_size=32, moe_shared_expert_gate=True, untie_embeddings_and_output_weights=None,
        eval_interval=10, eval_iters=2, **TENSOR,
    )


@pytest.mark.slow
def test_fp16(parity):
    """With the distributed optimizer and its overlaps, over two ZP groups and two waves, a dense layer first.

    Stock Megatron's own expert-parallel sizes differ by 1e-4 here; the one compared with has two groups as well.
    """
    parity.check(
        2, 1, 2, hetermoe=["--hetermoe-wave", "2"], fp16=True, loss_scale=1024, use_distributed_optimizer=True,
        overlap_grad_reduce=True, overlap_param_gather=True, num_layers=3, moe_layer_freq="[0,1,1]",
        ffn_hidden_size=64, expert_model_parallel_size=2, **TENSOR,
    )


@pytest.mark.slow
def test_dropout_with_full_recomputation(parity):
    """Each part of a sequence draws its own numbers; one microbatch at a time they are stock Megatron's."""
    parity.check(
        2, 1, hetermoe=["--hetermoe-schedule", "sequential"], global_batch_size=4, recompute_granularity="full",
        recompute_method="block", recompute_num_layers=1, hidden_dropout=0.1, attention_dropout=0.1,
        moe_input_jitter_eps=0.05, **TENSOR,
    )


@pytest.mark.slow
def test_selective_recomputation(parity):
    parity.check(
        2, 1, global_batch_size=4, recompute_granularity="selective",
        recompute_modules=["core_attn", "layernorm", "shared_experts", "moe"], moe_shared_expert_intermediate_size=32,
        qk_layernorm=True, moe_router_load_balancing_type="global_aux_loss", **TENSOR,
    )


@pytest.mark.slow
def test_dropped_tokens(parity):
    """Capacity counts the tokens of a rank's part of the sequence, as in stock Megatron."""
    parity.check(
        2, 2, global_batch_size=4, moe_expert_capacity_factor=1.0, moe_token_drop_policy="probs", overlap_grad_reduce=True,
        **TENSOR,
    )
