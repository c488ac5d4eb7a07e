"""Recomputation changes memory, never numbers; and it does run tasks again."""

from __future__ import annotations

from ranks import run_function

FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
DENSE_FIRST = {"num_layers": 3, "moe_layer_freq": "[0,1,1]", "ffn_hidden_size": 64}


def test_full_uniform(parity):
    """What a router counts (losses, tokens for its bias) is counted once though it runs twice."""
    parity.check(
        2, 2, hetermoe=["--hetermoe-wave", "3"], recompute_method="uniform", moe_z_loss_coeff=0.1,
        moe_aux_loss_coeff=0.5, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.01, moe_shared_expert_intermediate_size=32, use_distributed_optimizer=True,
        overlap_grad_reduce=True, overlap_param_gather=True, **FULL, **DENSE_FIRST,
    )


def test_full_block_with_dropout_and_jitter(parity):
    """The second run draws the random numbers of the first; one microbatch at a time, they are stock Megatron's."""
    parity.check(
        2, 1, hetermoe=["--hetermoe-schedule", "sequential"], recompute_method="block", hidden_dropout=0.1,
        attention_dropout=0.1, moe_input_jitter_eps=0.05, num_layers=3, moe_layer_freq="[1,1,0]", ffn_hidden_size=64,
        **FULL,
    )


def test_selective(parity):
    """All that is offered, in fp16."""
    parity.check(
        2, 2, recompute_granularity="selective",
        recompute_modules=["core_attn", "layernorm", "mlp", "shared_experts", "moe"],
        moe_shared_expert_intermediate_size=32, moe_shared_expert_gate=True, fp16=True, loss_scale=1024,
        moe_router_load_balancing_type="global_aux_loss", **DENSE_FIRST,
    )


def _memory_kept(rank: int, world: int) -> dict[str, list[int]]:
    """For a node's function, plain and run again: how often it ran, and elements kept between its two passes."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel.utils import ScheduleNode

    from megatron_hetermoe.mcore.recompute import rerun

    tensor_parallel.random.initialize_rng_tracker()
    weight = torch.randn(64, 64, requires_grad=True)
    result = {}
    for name, wrap in (("plain", lambda function: function), ("again", lambda function: lambda x: rerun(function, x))):
        runs, kept = [], {}

        def function(x):
            runs.append(torch.is_grad_enabled())
            for _ in range(10):
                x = torch.tanh(x @ weight)
            return x

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        node = ScheduleNode(wrap(function), torch.cuda.current_stream, torch.cuda.Event())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            node.forward(torch.ones(128, 64, requires_grad=True))
        elements = sum(kept.values())
        node.backward(torch.ones(128, 64))
        result[name] = [len(runs), elements]
    return result


def test_a_task_that_runs_again_keeps_its_inputs_only():
    (kept,) = run_function(_memory_kept, 1)
    assert kept["plain"][0] == 1 and kept["plain"][1] >= 10 * 128 * 64
    assert kept["again"] == [2, 128 * 64]
