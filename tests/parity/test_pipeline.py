"""Pipeline stages, one ZP group each: the losses are those of stock Megatron without a pipeline."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from parity_cases import placement_file
from ranks import Run, assert_same_steps

from megatron_hetermoe.cli.plan import flags_of
from megatron_hetermoe.cost.cluster import cluster_from_document, kinds_of
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.planner.options import Question
from megatron_hetermoe.planner.search import search

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from shapes import shape  # noqa: E402

SHORT = {"num_layers": 4, "global_batch_size": 4}


def check(parity, m: int, n: int, g: int = 1, hetermoe=(), stages: int = 2, split=(), rel: float = 1e-5, **model) -> Run:
    """M and N of each stage. The last stage's ranks have the loss, all have the gradient norm."""
    model = {**SHORT, **model}
    reference = parity.stock(m * g, **model)
    run = parity.disaggregated(
        m * stages, n * stages, g, hetermoe, pipeline_model_parallel_size=stages, **dict(split), **model
    )
    losses = 0
    for rank, steps in enumerate(run.steps):
        pool, first = (m * g, 0) if rank < m * g * stages else (n * g, m * g * stages)
        if (rank - first) // pool == stages - 1:
            losses += 1
            assert_same_steps(steps, reference.steps[0], rel=rel)
            for ours, theirs in zip(run.evals[rank], reference.evals[0], strict=True):
                assert ours.loss == pytest.approx(theirs.loss, rel=rel)
        else:
            assert_same_steps([replace(step, loss={}) for step in steps],
                              [replace(step, loss={}) for step in reference.steps[0]], rel=rel)
    assert losses == (m + n) * g
    further = {key: value for key, value in reference.scalars[-1].items() if key[0].startswith("mtp_")}
    assert {key: run.scalars[-1][key] for key in further} == pytest.approx(further, rel=rel)
    return run


@pytest.mark.parametrize("wave", [2, *(pytest.param(wave, marks=pytest.mark.slow) for wave in (1, None))])
def test_waves(parity, wave):
    """1F1B of single microbatches, of pairs, and one wave of a step."""
    check(parity, 1, 1, hetermoe=["--hetermoe-wave", str(wave)] if wave else [])


UNEVEN = {"decoder_first_pipeline_num_layers": 2}


def test_uneven_stages_tied_embeddings_distributed_optimizer(parity):
    """The first stage has two layers, one of them dense, the last one; both have the embedding, and add up its
    gradients."""
    check(
        parity, 1, 1, hetermoe=["--hetermoe-wave", "1"], split=UNEVEN, num_layers=3,
        untie_embeddings_and_output_weights=False, use_distributed_optimizer=True, overlap_grad_reduce=True,
        overlap_param_gather=True, moe_layer_freq="([0,1,1])", eval_iters=2, eval_interval=10,
        calculate_per_token_loss=True, log_params_norm=True, log_num_zeros_in_grad=True,
    )


def test_experts_on_attention_ranks_in_a_stage(parity):
    placement = placement_file(
        parity, experts=8, layers={"all": {"e0": ["0-7"]}, 2: {"a0": [0, 5], "e0": [1, 2, 3, 4, 6, 7]}, 3: {"a0": ["0-7"]}}
    )
    check(parity, 1, 1, hetermoe=["--hetermoe-placement", placement, "--hetermoe-wave", "2"],
          moe_router_load_balancing_type="seq_aux_loss", moe_z_loss_coeff=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delayed", "merged", "recompute", "sequential", "expert-bias", "fp16", "self-check"])
def test_beside(parity, name):
    hetermoe, model, rel = {
        "delayed": (["--hetermoe-weight-gradients", "delayed", "--hetermoe-wave", "2"], {}, 1e-5),
        "merged": (["--hetermoe-weight-gradients", "merged", "--hetermoe-wave", "2"], {}, 1e-5),
        "recompute": ([], {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}, 1e-5),
        "sequential": (["--hetermoe-schedule", "sequential"], {"num_query_groups": 4}, 1e-5),
        "expert-bias": ([], {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}, 1e-5),
        "fp16": ([], {"fp16": True, "initial_loss_scale": 2.0**16}, 3e-3),
        "self-check": (["--hetermoe-self-check", "2"], {}, 1e-5),
    }[name]
    check(parity, 1, 1, hetermoe=hetermoe, rel=rel, **model)


@pytest.mark.slow
def test_three_stages(parity):
    check(parity, 1, 1, stages=3, hetermoe=["--hetermoe-wave", "1"], split={"decoder_last_pipeline_num_layers": 2})


def test_a_stage_without_experts(parity):
    """Its expert ranks have no parameter and no task, and take part in what all ranks do."""
    check(parity, 1, 1, hetermoe=["--hetermoe-wave", "1"], num_layers=3, moe_layer_freq="([0,1,1])",
          split={"pipeline_model_parallel_layout": "Et|ttL"}, use_distributed_optimizer=True, log_params_norm=True,
          log_num_zeros_in_grad=True)


@pytest.mark.slow
@pytest.mark.parametrize("moe", ["([0,0,1])", "([1,0,0])"])
@pytest.mark.parametrize("stages", ["Et|t|tL", None])
def test_stages_without_experts(parity, moe, stages):
    split = {"pipeline_model_parallel_layout": stages} if stages else {}
    check(parity, 1, 1, stages=3, num_layers=3, moe_layer_freq=moe, split=split, eval_iters=2, eval_interval=10)


@pytest.mark.slow
def test_layouts_of_stages(parity):
    """An embedding and a loss that count as a layer each, and further tokens in a layout."""
    check(parity, 1, 1, hetermoe=["--hetermoe-wave", "1"], num_layers=5,
          split={"account_for_embedding_in_pipeline_split": True})
    check(parity, 1, 1, hetermoe=["--hetermoe-wave", "1"], num_layers=3, mtp_num_layers=1,
          split={"pipeline_model_parallel_layout": "Ett|tmL"})


@pytest.mark.slow
def test_layers_that_predict_further_tokens(parity):
    """They are in the last stage, which has an embedding too."""
    check(parity, 1, 1, hetermoe=["--hetermoe-wave", "1"], split=UNEVEN, num_layers=3, mtp_num_layers=2,
          use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, tensorboard_dir="tensorboard")


@pytest.mark.slow
@pytest.mark.parametrize("m, n, g", [(1, 1, 2), (2, 1, 1), (1, 2, 1)])
def test_layouts(parity, m, n, g):
    """ZP groups that are data-parallel, and any M and N in each stage."""
    check(parity, m, n, g, hetermoe=["--hetermoe-wave", "1"], use_distributed_optimizer=True)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [{"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"context_parallel_size": 2}])
def test_beside_shared_attention(parity, shared):
    check(parity, 2, 1, hetermoe=["--hetermoe-wave", "2"], **shared)


@pytest.mark.slow
def test_beside_shared_experts(parity):
    check(parity, 1, 2, expert_tensor_parallel_size=2)


@pytest.mark.parametrize("stage_layers, virtual, said", [
    ((2, 2), 1, []), pytest.param((1, 1, 1, 1), 2, ["--num-virtual-stages-per-pipeline-rank", "2"], marks=pytest.mark.slow)])
def test_a_planned_pipeline_trains(parity, tmp_path, stage_layers, virtual, said):
    """The planner's plan, with the flags that it names, on the ranks that it asks for."""
    link = {"gb_per_s": 10, "latency_us": 10}
    on = cluster_from_document({"pools": {
        name: {"kind": kind, "nodes": 1, "gpus_per_node": 2, "memory_gb": 32, "intra_node": link, "inter_node": link}
        for name, kind in (("new", "A40"), ("old", "V100-SXM2"))}}, "cluster")
    of = shape(layers=4)
    asked = Question(of, "fp32", 1, 4, 255, ("none",), (False,), stage_layers=(stage_layers,), virtual_stages=virtual)
    plan = search(asked, on, kinds_of(on, of, "fp32", Notes())).best[0].plan()
    assert (plan.attention_ranks, plan.expert_ranks, plan.stages) == (2, 2, 2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    flags = flags_of(plan)
    assert flags == ["--micro-batch-size", "1", "--pipeline-model-parallel-size", "2", *said]
    split = {"num_virtual_stages_per_pipeline_rank": virtual} if virtual > 1 else {}
    check(parity, 1, 1, hetermoe=["--hetermoe-plan", str(tmp_path / "plan.json")], split=split)


def test_virtual_stages(parity):
    """Two chunks a stage, and waves that do not divide by the stages."""
    check(parity, 1, 1, hetermoe=["--hetermoe-wave", "2"], split={"num_virtual_stages_per_pipeline_rank": 2},
          global_batch_size=6, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


LAYOUT = {"pipeline_model_parallel_layout": "Et|tt|t|tL"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "layout", "further", "experts-on-attention", "beside", "groups", "three", "fp16"])
def test_beside_virtual_stages(parity, name):
    per_chunk = {"num_layers_per_virtual_pipeline_stage": 1}
    placement = ["--hetermoe-placement", placement_file(
        parity, experts=8, layers={"all": {"e0": ["0-7"]}, 2: {"a0": [0, 5], "e0": [1, 2, 3, 4, 6, 7]}, 3: {"a0": ["0-7"]}})]
    m, n, g, stages, hetermoe, split, model, rel = {
        "tied": (1, 1, 1, 2, [], per_chunk, {"untie_embeddings_and_output_weights": False, "use_distributed_optimizer": True}, 1e-5),
        "layout": (1, 1, 1, 2, [], LAYOUT, {"num_layers": 5, "moe_layer_freq": "([0,1,1,0,1])", "eval_iters": 2,
                                            "eval_interval": 10, "log_params_norm": True}, 1e-5),
        "further": (1, 1, 1, 2, [], {"pipeline_model_parallel_layout": "Et|t|t|tmL"},
                    {"mtp_num_layers": 1, "tensorboard_dir": "tensorboard"}, 1e-5),
        "experts-on-attention": (1, 1, 1, 2, placement, per_chunk, {"moe_z_loss_coeff": 1e-3}, 1e-5),
        "beside": (2, 1, 1, 2, [], per_chunk, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute_granularity": "full",
                                               "recompute_method": "block", "recompute_num_layers": 1}, 1e-5),
        "groups": (1, 1, 2, 2, ["--hetermoe-weight-gradients", "delayed"], per_chunk, {"global_batch_size": 8}, 1e-5),
        "three": (1, 1, 1, 3, [], per_chunk, {"num_layers": 6, "global_batch_size": 8}, 1e-5),
        "fp16": (1, 1, 1, 2, [], per_chunk, {"fp16": True, "initial_loss_scale": 2.0**16}, 3e-3),
    }[name]
    check(parity, m, n, g, ["--hetermoe-wave", "1", *hetermoe], stages, split, rel, **model)
