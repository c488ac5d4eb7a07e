"""Attention ranks that have parts of one sequence, against stock Megatron with whole sequences."""

from __future__ import annotations

import pytest
from parity_cases import placement_file

CONTEXT = {"context_parallel_size": 2}


@pytest.mark.parametrize(
    "m, n, g, sizes",
    [
        (2, 1, 1, {}), pytest.param(2, 2, 2, {"use_distributed_optimizer": True}, marks=pytest.mark.slow),
        pytest.param(3, 2, 1, {"context_parallel_size": 3, "seq_length": 24}, marks=pytest.mark.slow),
    ],
)
def test_layout(parity, m, n, g, sizes):
    parity.check(m, n, g, global_batch_size=4, **{**CONTEXT, **sizes})


@pytest.mark.slow
def test_beside_tensor_parallelism(parity):
    """Of both pools, with per-token loss, losses of the router, evaluation and recomputation."""
    parity.check(
        4, 2, global_batch_size=4, tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2,
        calculate_per_token_loss=True, moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.1, recompute_granularity="full",
        recompute_method="uniform", recompute_num_layers=1, eval_interval=10, eval_iters=2, **CONTEXT,
    )


@pytest.mark.slow
def test_experts_on_attention_ranks(parity):
    """Learned positions, a dense layer, a shared expert, overlapped reduction, gradients of weights in their own tasks."""
    placement = placement_file(parity, experts=8, layers={"all": {"a0": [0], "a1": [3], "e0": [1, 2, "4-7"]}})
    parity.check(
        2, 1, hetermoe=["--hetermoe-placement", placement, "--hetermoe-weight-gradients", "delayed"], global_batch_size=4, num_layers=3, moe_layer_freq="[1,0,1]",
        ffn_hidden_size=64, position_embedding_type="learned_absolute", moe_shared_expert_intermediate_size=32,
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, **CONTEXT,
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_every_parameters_gradient(parity, per_token):
    from test_gradients import squares

    model = {"train_iters": 1, "calculate_per_token_loss": per_token, "moe_aux_loss_coeff": 0.5, **CONTEXT}
    theirs = squares(parity.stock(4, **model).gradients, 1)
    ours = squares(parity.disaggregated(4, 3, 1, **model).gradients, 1)
    assert ours == pytest.approx(theirs, rel=1e-5)
