"""What graphs replay is what ran before. On the CPU the work runs again on the same tensors, all else is as on a GPU."""

from __future__ import annotations

import pytest
from parity_cases import placement_file
from ranks import assert_same_steps

GRAPHS = ["--hetermoe-cuda-graphs"]
MODELS = {
    "waves of three": (["--hetermoe-wave", "3", "--hetermoe-weight-gradients", "merged"], {"global_batch_size": 16}),
    "sequential": (["--hetermoe-schedule", "sequential"], {}),
    # What routers count, a shared expert, dense layers, and a loss that is scaled.
    "router": ([], {
        "num_layers": 3, "moe_layer_freq": "[1,0,1]", "ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 32,
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_z_loss_coeff": 0.001, "calculate_per_token_loss": True,
        "use_distributed_optimizer": True, "overlap_grad_reduce": True,
    }),
    "evaluation between": ([], {"eval_iters": 1, "eval_interval": 3}),
    "capacity": ([], {"moe_expert_capacity_factor": 1.0}),
}


@pytest.mark.parametrize("flags, model", [
    pytest.param(*of, id=name, marks=[pytest.mark.slow] if name != "router" else []) for name, of in MODELS.items()])
def test_graphs_change_nothing(parity, flags, model):
    placement = placement_file(
        parity, experts=8, layers={"all": {"e0": ["0-3"], "e1": ["4-7"]}, 1: {"a0": [0, 5], "e0": [1, 2, 3], "e1": [4, 6, 7]}})
    flags = [*flags, "--hetermoe-placement", placement]
    without = parity.disaggregated(2, 2, 1, flags, **model)
    with_graphs = parity.disaggregated(2, 2, 1, [*flags, *GRAPHS], **model)
    for ours, theirs in zip(with_graphs.steps, without.steps, strict=True):
        assert_same_steps(ours, theirs)
    assert with_graphs.evals == without.evals or [
        [one.loss for one in evals] for evals in with_graphs.evals] == [[one.loss for one in evals] for evals in without.evals]
    for ours, theirs in zip(with_graphs.scalars, without.scalars, strict=True):
        assert ours == theirs


def test_what_graphs_cannot_do_is_refused(parity):
    from ranks import run_ranks

    flags = parity.flags(moe_input_jitter_eps=0.1, attention_dropout=0.1, recompute_granularity="full",
                         recompute_method="uniform", recompute_num_layers=1)
    run = run_ranks(["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1", *GRAPHS, *flags], 2,
                    cwd=parity.folder)
    assert run.exit_codes == [2, 2]
    for what in ("--moe-input-jitter-eps", "dropout", "--recompute-granularity"):
        assert f"{what} is not supported with --hetermoe-cuda-graphs" in run.output[0]
