"""Stock Megatron on the CPU: that runs can be compared, and that the platform trains in all the ways it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from models import tiny
from ranks import assert_same_steps, run_ranks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The weights of one step of training, which every layout can begin with."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save = folder / "weights"
    flags = tiny(train_iters=1, save=save, save_interval=1, no_save_optim=True, no_save_rng=True)
    run_ranks([*flags, "--ckpt-format", "torch_dist"], 2, cwd=folder).check()
    return save


def _from(checkpoint: Path, **overrides) -> list[str]:
    return tiny(load=checkpoint, finetune=True, no_load_optim=True, no_load_rng=True, **overrides)


def test_expert_parallelism_does_not_change_the_training(tmp_path, checkpoint):
    """The same 20 steps whether a rank holds all experts or half of them, from one checkpoint."""
    whole = run_ranks(_from(checkpoint), 2, cwd=tmp_path).check()
    halves = run_ranks(_from(checkpoint, expert_model_parallel_size=2), 2, cwd=tmp_path).check()
    assert len(whole.steps[0]) == 20
    assert_same_steps(halves.steps[0], whole.steps[0], rel=1e-5)
    assert whole.steps[0][-1].loss["lm loss"] < whole.steps[0][0].loss["lm loss"] - 0.3


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_a_resumed_run_is_bit_equal(tmp_path, precision):
    """Eight steps, and four resumed after four: the same numbers to the last bit."""
    flags = {"expert_model_parallel_size": 2, "save": tmp_path / "all", "save_interval": 4, **precision}
    whole = run_ranks(tiny(train_iters=8, **flags), 2, cwd=tmp_path).check()
    first = run_ranks(tiny(train_iters=8, exit_interval=4, **{**flags, "save": tmp_path / "half"}), 2, cwd=tmp_path)
    first.check()
    flags["save"] = tmp_path / "rest"
    rest = run_ranks(tiny(train_iters=8, load=tmp_path / "half", **flags), 2, cwd=tmp_path).check()
    assert_same_steps(first.steps[0], whole.steps[0][:4])
    assert_same_steps(rest.steps[0], whole.steps[0][4:])


VARIANTS = {
    "distributed-optimizer": {"use_distributed_optimizer": True},
    "overlap": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, checkpoint):
    """Six steps of the plain run."""
    return run_ranks(_from(checkpoint, train_iters=6), 2, cwd=tmp_path_factory.mktemp("reference")).check()


@pytest.mark.parametrize("name", VARIANTS)
def test_what_does_not_change_the_numbers(tmp_path, checkpoint, reference, name):
    run = run_ranks(_from(checkpoint, train_iters=6, **VARIANTS[name]), 2, cwd=tmp_path).check()
    assert_same_steps(run.steps[1], reference.steps[1], rel=1e-5)


def test_fp16_skips_until_the_loss_scale_fits(tmp_path, checkpoint):
    """From a scale that overflows, the first step is skipped and the scale falls."""
    flags = {"fp16": True, "initial_loss_scale": 2.0**40, "hysteresis": 1, "use_distributed_optimizer": True}
    run = run_ranks(_from(checkpoint, train_iters=4, **flags), 2, cwd=tmp_path).check()
    steps = run.steps[0]
    assert steps[0].skipped == 1
    assert steps[-1].loss_scale < 2.0**40
    assert [step.loss_scale for step in steps] == [step.loss_scale for step in run.steps[1]]


@pytest.mark.parametrize("precision", [{"fp16": True, "loss_scale": 1024}, {"bf16": True}], ids=["fp16", "bf16"])
def test_half_precision_stays_near(tmp_path, checkpoint, reference, precision):
    flags = {"expert_model_parallel_size": 2, **precision}
    run = run_ranks(_from(checkpoint, train_iters=6, **flags), 2, cwd=tmp_path).check()
    assert_same_steps(run.steps[0], reference.steps[0], rel=0.05)


def test_evaluation_agrees_between_layouts(tmp_path, checkpoint):
    flags = {"train_iters": 2, "eval_iters": 2, "eval_interval": 2}
    whole = run_ranks(_from(checkpoint, **flags), 2, cwd=tmp_path).check()
    halves = run_ranks(_from(checkpoint, expert_model_parallel_size=2, **flags), 2, cwd=tmp_path).check()
    assert len(whole.evals[0]) == 3  # after the last step, and then both held-out sets
    for ours, theirs in zip(halves.evals[0], whole.evals[0], strict=True):
        assert math.isclose(ours.loss["lm loss"], theirs.loss["lm loss"], rel_tol=1e-5)
