"""Recomputation changes memory, never numbers; and it does run tasks again."""

from __future__ import annotations

import pytest
from parity_cases import placement_file
from ranks import assert_same_steps, run_function

FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
DENSE_FIRST = {"num_layers": 3, "moe_layer_freq": "[0,1,1]", "ffn_hidden_size": 64}


@pytest.mark.slow
def test_full_uniform(parity):
    """What a router counts (losses, tokens for its bias) is counted once though it runs twice."""
    parity.check(
        2, 2, hetermoe=["--hetermoe-wave", "3"], recompute_method="uniform", moe_z_loss_coeff=0.1,
        moe_aux_loss_coeff=0.5, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.01, moe_shared_expert_intermediate_size=32, use_distributed_optimizer=True,
        overlap_grad_reduce=True, overlap_param_gather=True, **FULL, **DENSE_FIRST,
    )


@pytest.mark.slow
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


ACTIVATION = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act"]}


@pytest.mark.parametrize(
    "experts, ours, model",
    [
        ("grouped", ["--hetermoe-weight-gradients", "delayed"],
         {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
        pytest.param("sequential", ["--hetermoe-weight-gradients", "delayed", "--hetermoe-wave", "2"], {},
                     marks=pytest.mark.slow),
        pytest.param("grouped", ["--hetermoe-weight-gradients", "merged", "--hetermoe-wave", "2"], {}, marks=pytest.mark.slow),
        pytest.param("grouped", [], {"bf16": True}, marks=pytest.mark.slow),
        ("sequential", [], {"swiglu": None, "no_bias_gelu_fusion": True}),
    ],
    ids=["grouped-delayed", "sequential-delayed", "grouped-merged", "bf16", "gelu"],
)
def test_activation_of_experts(parity, experts, ours, model):
    """What runs again gives what was there: bit-equal to a run that keeps it, with experts on attention ranks too."""
    placement = placement_file(
        parity, experts=8, layers={1: {"a0": [0, 5], "e0": [1, 2, 3], "e1": [4, 6, 7]}, 2: {"e1": ["0-7"]}})
    ours = ["--hetermoe-experts", experts, "--hetermoe-placement", placement, *ours]
    model = {"train_iters": 5, **model}
    again, kept = (parity.disaggregated(2, 2, 1, ours, **model, **recompute) for recompute in (ACTIVATION, {}))
    for one, other in zip(again.steps, kept.steps, strict=True):
        assert_same_steps(one, other)


def _experts_keep(rank: int, world: int) -> dict[str, list]:
    """For two experts one after the other, kept and made again: gradients, and elements that are there between passes."""
    import torch
    import torch.nn.functional as F
    from types import SimpleNamespace

    from megatron.core.transformer.mlp import MLP
    from megatron_hetermoe.mcore.activation import expert_again

    torch.manual_seed(1)
    weights = [torch.randn(64, 8, requires_grad=True), torch.randn(8, 32, requires_grad=True)]
    config = SimpleNamespace(use_te_activation_func=False, bias_activation_fusion=False, gated_linear_unit=True,
                             activation_func=F.silu, activation_func_clamp_value=None, glu_linear_offset=0.0)

    class Linear(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.of = [weight]

        def forward(self, rows):
            return rows @ self.of[0].t(), None

    expert = SimpleNamespace(
        config=config, activation_func=F.silu, linear_fc1=Linear(weights[0]), linear_fc2=Linear(weights[1]))
    rows, probs = torch.randn(100, 8), torch.rand(100)
    result = {}
    for name, forward in (("kept", MLP.forward), ("again", expert_again)):
        there = {}

        def keep(tensor):
            there[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        given = rows.clone().requires_grad_(), probs.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output, _ = forward(expert, *given)
        found = torch.autograd.grad(output.square().sum(), [*given, *weights])
        result[name] = [sum(there.values()), [one.flatten().tolist() for one in found]]
    return result


def test_an_activation_that_is_made_again_is_not_kept():
    (found,) = run_function(_experts_keep, 1)
    assert found["again"][1] == found["kept"][1]
    assert found["again"][0] <= found["kept"][0] - 100 * 32
