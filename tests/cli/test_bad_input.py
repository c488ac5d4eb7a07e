"""Bad input gives one message that names every problem, exit code 2, on every rank, before anything is set up."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from models import tiny
from ranks import run_ranks

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.step import Step

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from shapes import shape  # noqa: E402

ROOT = Path(__file__).parents[2]
OURS = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2"]


def refused(argv: list[str], tmp_path: Path, world: int = 4) -> str:
    """Runs ranks that must all refuse; returns the message."""
    run = run_ranks(argv, world, cwd=tmp_path, timeout=60)
    assert run.exit_codes == [2] * world, run.output
    assert not any("Traceback" in output for output in run.output)
    messages = [output for output in run.output if "hetermoe: " in output]
    assert messages == run.output[:1], "the message comes once, from the first rank"
    return messages[0]


@pytest.fixture
def placement(tmp_path):
    def write(**document) -> list[str]:
        path = tmp_path / "placement.yaml"
        path.write_text(yaml.safe_dump(document))
        return ["--hetermoe-placement", str(path)]

    return write


def test_every_problem_is_named_at_once(tmp_path):
    said = refused(
        ["--hetermoe", "--hetermoe-attention-ranks", "3", "--hetermoe-expert-ranks", "2", "--hetermoe-colour", "red",
         "--hetermoe-wave", "none", *tiny(mtp_num_layers=1, mtp_detach_heads=True, rampup_batch_size=[4, 3, 32],
                                            step_batch_size_schedule="0:4 1K:6")], tmp_path,
    )
    for problem in (
        "unknown flag --hetermoe-colour", "--hetermoe-wave is 'none'",
        "3 attention and 2 expert ranks need 5 ranks, but 4 were started",
        "--mtp-detach-heads is not supported",
        "--rampup-batch-size is not supported with --hetermoe: Megatron does not read it any more",
        "--step-batch-size-schedule's batch of 4 does not divide by micro batch size 1 x 3 attention ranks = 3: take 3 or 6",
        "--global-batch-size 8 does not divide by micro batch size 1 x 3 attention ranks = 3: take 6 or 9",
    ):
        assert problem in said, problem
    assert said.startswith("hetermoe: 7 problems:")


@pytest.mark.parametrize(
    "document, said",
    [
        ({"experts": 8, "layers": {"all": {"e0": ["0-3"], "e1": ["5-7"]}}}, "expert 4 has no holder"),
        ({"experts": 8, "layers": {"all": {"e0": ["0-4"], "e1": ["4-7"]}}}, "expert 4 has 2 holders, e0 and e1"),
        ({"experts": 16, "layers": {"all": {"e0": ["0-15"]}}}, "16 experts a layer, this one has 8"),
        ({"experts": 8, "layers": {"all": {"e0": ["0-7"]}, 7: {"e0": ["0-7"]}}}, "layer 7 does not exist"),
    ],
)
def test_placements(tmp_path, placement, document, said):
    assert said in refused([*OURS, *placement(**document), *tiny()], tmp_path)


@pytest.mark.parametrize(
    "argv, said",
    [
        ([*OURS, *tiny(no_such_flag=True)], "Megatron does not accept these flags: unrecognized arguments: "
                                            "--no-such-flag"),
        ([*OURS, *tiny(num_experts=None)], "the model has no experts"),
        ([*OURS, *tiny(moe_router_topk=1)], "Please use --moe-router-pre-softmax when topk is 1"),
        ([*OURS, *tiny(lr_decay_style="zigzag")], "zigzag"),
        ([*OURS, *tiny(tensor_model_parallel_size=2)],
         "--tensor-model-parallel-size above 1 without --sequence-parallel is not supported with --hetermoe: add it"),
        ([*OURS, "--hetermoe-attention", "megatron", *tiny(context_parallel_size=2)],
         "--hetermoe-attention megatron knows no context parallelism"),
        ([*OURS, "--hetermoe-attention", "math", *tiny(reset_attention_mask=True)], "--reset-attention-mask is not"),
        ([*OURS, *tiny(eval_interval=None)], "--eval-interval is missing"),
        ([*OURS, *tiny(train_iters=5, lr_warmup_iters=5)],
         "--lr-warmup-iters 5 does not end before --train-iters 5"),
        ([*OURS, *tiny(moe_router_load_balancing_type="sinkhorn")], "sinkhorn does not take --moe-aux-loss-coeff"),
        ([*OURS, *tiny(moe_router_load_balancing_type="quantile_balancing", moe_router_num_groups=4, moe_router_group_topk=2)],
         "quantile_balancing does not take --moe-router-group-topk"),
        ([*OURS, *tiny(moe_apply_probs_on_input=True)], "--moe-apply-probs-on-input does not take --moe-router-topk 2"),
        ([*OURS, *tiny(num_attention_heads=0, num_layers=-1)], "--num-layers is -1, --num-attention-heads is 0: each"),
        ([*OURS[1:], *tiny()], "without --hetermoe: add --hetermoe"),
        ([*OURS, "--hetermoe-experts", "grouped", *tiny(hidden_size=36, bf16=True)],
         "--hetermoe-experts grouped cannot be on rank 2: hidden sizes 36 and 32 in bf16 are not"),
        ([*OURS, "--hetermoe-expert-precision", "fp16", *tiny()],
         "experts in fp16 beside attention in fp32 are not supported: --hetermoe-expert-precision may be fp32 there"),
        ([*OURS, "--hetermoe-expert-precision", "fp32", *tiny(bf16=True, loss_scale=8)], "--loss-scale is not supported"),
        ([*OURS, *tiny(transformer_impl="inference_optimized")], "--transformer-impl inference_optimized is not supported"),
        ([*OURS, "--hetermoe-expert-impl", "transformer_engine", "--hetermoe-experts", "grouped", *tiny()],
         "--hetermoe-expert-impl transformer_engine is not supported with --hetermoe-experts grouped, which is for torch's"),
        ([*OURS, "--hetermoe-expert-impl", "transformer_engine", "--hetermoe-weight-gradients", "merged", *tiny()],
         "--hetermoe-expert-impl transformer_engine is not supported with --hetermoe-weight-gradients merged: use auto"),
        ([*OURS, "--hetermoe-expert-impl", "torch", *tiny()], "'torch'; it must be one of auto, local, transformer_engine"),
        ([*OURS, "--hetermoe-schedule", "sequential", "--hetermoe-wave", "2", *tiny()], "contradicts"),
    ],
)
def test_flags(tmp_path, argv, said):
    assert said in refused(argv, tmp_path)


def test_tensor_parallelism_that_does_not_fit(tmp_path):
    """Ranks, batch and sizes at once; the batch divides by microbatches, which ranks share."""
    said = refused(
        ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "3",
         *tiny(tensor_model_parallel_size=3, sequence_parallel=True, expert_tensor_parallel_size=2, global_batch_size=3,
               micro_batch_size=2, moe_ffn_hidden_size=33)], tmp_path, 5,
    )
    for problem in (
        "2 attention ranks do not divide into 1 ZP groups, each of them into groups of 3 that tensor",
        "groups of 2 that tensor or context parallelism puts together; take 2 or 4",
        "--tensor-model-parallel-size 3 does not divide --seq-length 32",
        "--expert-tensor-parallel-size 2 does not divide --moe-ffn-hidden-size 33",
        "2 attention ranks / 3 that share a microbatch = 2: take 2 or 4",
    ):
        assert problem in said, problem


def test_split_experts_beside_whole_ones(tmp_path, placement):
    argv = placement(experts=8, layers={"all": {"a0": [0], "e0": ["1-7"]}})
    said = refused([*OURS, *argv, *tiny(expert_tensor_parallel_size=2)], tmp_path)
    assert "experts on attention ranks, where they are whole" in said and "place all experts on expert ranks" in said


def test_a_plan_that_was_reckoned_with_other_flags(tmp_path):
    plan = Plan(
        shape(), 2, 2, 1, ((2, 2, 2, 2, 3, 3, 3, 3),) * 2,
        step=Step(micro_batch=2, microbatches=4, vocabulary=255, recompute="core_attn", distributed_optimizer=True,
                  cuda_graphs=True),
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    said = refused(["--hetermoe", "--hetermoe-plan", str(tmp_path / "plan.json"), *tiny(global_batch_size=7)], tmp_path)
    for problem in (
        "the plan was made with --micro-batch-size 2, the flags say 1", "--use-distributed-optimizer True, the flags",
        "--hetermoe-cuda-graphs True, the flags say False",
        "core_attn, the flags say none", "--global-batch-size 7 does not divide",
    ):
        assert problem in said, problem


def test_superseded_flags_are_accepted_with_a_line_each(tmp_path):
    run = run_ranks([*OURS, *tiny(expert_model_parallel_size=4, train_iters=1)], 4, cwd=tmp_path).check()
    lines = [line for line in run.output[0].splitlines() if "is superseded" in line]
    assert [line.split()[1] for line in lines] == ["--expert-model-parallel-size", "--moe-token-dispatcher-type"]
    assert not any("is superseded" in output for output in run.output[1:])


def test_a_megatron_whose_source_is_another(tmp_path):
    """Its training loop no longer asks for a schedule by the name that is patched."""
    installed = importlib.util.find_spec("megatron.training").submodule_search_locations[0]
    shadow = tmp_path / "megatron" / "training"
    shutil.copytree(installed, shadow, ignore=shutil.ignore_patterns("__pycache__"))
    loop = shadow / "training.py"
    loop.write_text(loop.read_text().replace("get_forward_backward_func(\n", "get_schedule(\n"))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "RANK": "0", "WORLD_SIZE": "4"}
    ended = subprocess.run(
        [sys.executable, "-m", "megatron_hetermoe.pretrain_gpt", *OURS, *tiny()], env=environment, cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "megatron.training.training.get_forward_backward_func cannot be patched" in ended.stderr
    assert str(loop) in ended.stderr and "Megatron-Core 0.19" in ended.stderr


def test_pipelines_that_do_not_fit(tmp_path):
    """What a pipeline cannot have beside it, and layers that do not divide, at once."""
    said = refused(
        [*OURS, "--hetermoe-schedule", "overlapped", *tiny(
            num_layers=5, pipeline_model_parallel_size=2)], tmp_path,
    )
    for problem in (
        "overlapped waves are not supported with 2 pipeline stages",
        "stages of 2, 2 layers do not make up the model's 5",
    ):
        assert problem in said, problem
    assert "--pipeline-model-parallel-size 3 with 2 layers: it must be from 1 to that" in refused(
        [*OURS, *tiny(pipeline_model_parallel_size=3)], tmp_path)
    virtual = refused([*OURS, *tiny(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=0)], tmp_path)
    assert "--num-virtual-stages-per-pipeline-rank is 0: it must be from 1 on" in virtual
    layout = refused([*OURS, *tiny(num_layers=3, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|t|tL")], tmp_path)
    assert "has 3 stages, which --pipeline-model-parallel-size 2 does not divide: change one" in layout
