"""Checkpoints are Megatron's: weights cross between layouts and to stock, and a resume is exact."""

from __future__ import annotations

import pytest
from models import tiny
from parity_cases import placement_file
from ranks import assert_same_steps, run_ranks

LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2"]


def weights_only(path, **flags) -> list[str]:
    return tiny(load=path, finetune=True, no_load_optim=True, no_load_rng=True, train_iters=2, **flags)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Weights after ten steps of a disaggregated run with an uneven placement, and the next losses from them."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks([*LAYOUT, *tiny(train_iters=10, save=folder / "ours", save_interval=10)], 4, cwd=folder).check()
    next_steps = run_ranks([*LAYOUT, *weights_only(folder / "ours")], 4, cwd=folder).check()
    return folder / "ours", next_steps.steps[0]


@pytest.mark.parametrize("expert_parallel", [1, 2, 4])
def test_stock_continues_from_ours(tmp_path, saved, expert_parallel):
    path, expected = saved
    flags = weights_only(path, expert_model_parallel_size=expert_parallel)
    run = run_ranks(flags, max(2, expert_parallel), cwd=tmp_path).check()
    assert_same_steps(run.steps[0], expected, rel=1e-5)


def test_another_layout_continues_from_ours(tmp_path, saved, parity):
    """Three holders, one of them an attention rank, and another number of attention ranks."""
    path, expected = saved
    placement = placement_file(parity, experts=8, layers={"all": {"a0": [3, 0], "e0": [1, 2], "e1": ["4-7"]}})
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "2",
              "--hetermoe-placement", placement]
    run = run_ranks([*layout, *weights_only(path)], 3, cwd=tmp_path).check()
    assert_same_steps(run.steps[0], expected, rel=1e-5)


def test_ours_continues_from_stock(tmp_path):
    stock = tiny(train_iters=10, save=tmp_path / "stock", save_interval=10, expert_model_parallel_size=2)
    run_ranks(stock, 2, cwd=tmp_path).check()
    expected = run_ranks(weights_only(tmp_path / "stock", expert_model_parallel_size=2), 2, cwd=tmp_path).check()
    run = run_ranks([*LAYOUT, *weights_only(tmp_path / "stock")], 4, cwd=tmp_path).check()
    assert_same_steps(run.steps[0], expected.steps[0], rel=1e-5)


TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.slow
def test_tensor_parallel_sizes_read_each_others_weights(tmp_path):
    """Split attention and split experts, to stock Megatron's whole and split ones, and from its split ones."""
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "4"]
    flags = {**TENSOR, "expert_tensor_parallel_size": 2}
    ours = tiny(train_iters=5, global_batch_size=4, save=tmp_path / "ours", save_interval=5, **flags)
    run_ranks([*layout, *ours], 6, cwd=tmp_path).check()
    expected = run_ranks([*layout, *weights_only(tmp_path / "ours", **flags)], 6, cwd=tmp_path).check().steps[0]
    for world, sizes in ((2, {}), (2, TENSOR)):
        run = run_ranks(
            weights_only(
                tmp_path / "ours", expert_model_parallel_size=world, expert_tensor_parallel_size=1, save_interval=2,
                save=tmp_path / f"stock{world}{len(sizes)}", **sizes,
            ), world, cwd=tmp_path,
        ).check()
        assert_same_steps(run.steps[0], expected, rel=1e-5)
    source = tmp_path / f"stock2{len(TENSOR)}"
    expected = run_ranks(weights_only(source), 1, cwd=tmp_path).check().steps[0]
    for words, world, sizes in ((LAYOUT, 4, {}), (layout, 6, flags)):
        run = run_ranks([*words, *weights_only(source, **sizes)], world, cwd=tmp_path).check()
        assert_same_steps(run.steps[0], expected, rel=1e-5)


VARIANTS = {
    "fp32": {},
    "distributed-optimizer": {"use_distributed_optimizer": True},
    "fp16": {"fp16": True, "initial_loss_scale": 2.0**16},
    "fp16-distributed-optimizer": {
        "fp16": True, "loss_scale": 1024, "use_distributed_optimizer": True, "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}


@pytest.mark.parametrize("variant, groups", [*((variant, 1) for variant in VARIANTS), ("distributed-optimizer", 2)])
def test_a_resume_in_the_same_layout_is_bit_equal(tmp_path, parity, variant, groups):
    """Optimizer, random state and data position: the steps after a restart are those of an unbroken run."""
    placement = placement_file(parity, experts=8, layers={1: {"e0": ["0-7"]}, 2: {"a0": [0], "e0": ["1-7"]}})
    layout = ["--hetermoe", "--hetermoe-attention-ranks", str(groups), "--hetermoe-expert-ranks", str(groups),
              "--hetermoe-groups", str(groups), "--hetermoe-placement", placement]
    flags = {"train_iters": 8, "save_interval": 4, "global_batch_size": 4, **VARIANTS[variant]}

    def run(**others):
        return run_ranks([*layout, *tiny(**flags, **others)], 2 * groups, cwd=tmp_path).check()

    _assert_resumes(run, tmp_path, 2 * groups)


@pytest.mark.parametrize("variant", [pytest.param("fp32", marks=pytest.mark.slow), "fp16-distributed-optimizer"])
def test_a_resume_with_tensor_parallelism_is_bit_equal(tmp_path, variant):
    """With dropout, whose numbers differ between ranks that share a microbatch."""
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2"]
    flags = {"train_iters": 8, "save_interval": 4, "global_batch_size": 4, "expert_tensor_parallel_size": 2,
             "hidden_dropout": 0.1, **TENSOR, **VARIANTS[variant]}

    def run(**others):
        return run_ranks([*layout, *tiny(**flags, **others)], 4, cwd=tmp_path).check()

    _assert_resumes(run, tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp32", "distributed-optimizer", "fp16-distributed-optimizer"])
def test_a_resume_with_pipeline_stages_is_bit_equal(tmp_path, parity, variant):
    """With dropout of attention, whose numbers differ between stages, and an expert on the second stage's attention rank."""
    placement = placement_file(parity, experts=8, layers={1: {"e0": ["0-7"]}, 2: {"a0": [0], "e0": ["1-7"]}})
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2", "--hetermoe-wave", "1",
              "--hetermoe-placement", placement]
    flags = {"train_iters": 8, "save_interval": 4, "global_batch_size": 4, "attention_dropout": 0.1,
             "pipeline_model_parallel_size": 2, **VARIANTS[variant]}

    def run(**others):
        return run_ranks([*layout, *tiny(**flags, **others)], 4, cwd=tmp_path).check()

    _assert_resumes(run, tmp_path, 4)


def _assert_resumes(run, tmp_path, world: int) -> None:
    """Eight steps in one go against four and four."""
    unbroken = run(save=tmp_path / "unbroken")
    first = run(save=tmp_path / "broken", exit_interval=4)
    rest = run(load=tmp_path / "broken", save=tmp_path / "rest")
    for rank in range(world):
        assert_same_steps(first.steps[rank], unbroken.steps[rank][:4])
        assert_same_steps(rest.steps[rank], unbroken.steps[rank][4:])


@pytest.mark.parametrize("optimizer", [{}, {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}],
                         ids=["adam", "distributed"])
def test_an_expert_rank_that_holds_no_expert_resumes(tmp_path, parity, optimizer):
    """A placement may leave a rank without experts in all layers; it then has nothing in the checkpoint either."""
    placement = placement_file(parity, experts=8, layers={"all": {"a0": [0], "e0": ["1-7"]}})
    layout = [*LAYOUT, "--hetermoe-placement", placement]
    flags = {"train_iters": 4, "global_batch_size": 4, "save": tmp_path / "saved", "save_interval": 2, **optimizer}
    whole = run_ranks([*layout, *tiny(**flags)], 4, cwd=tmp_path).check().steps[0]
    run = run_ranks([*layout, *tiny(**flags, load=tmp_path / "saved", ckpt_step=2)], 4, cwd=tmp_path).check()
    for steps in run.steps:
        assert_same_steps(steps, whole[2:], rel=0)
