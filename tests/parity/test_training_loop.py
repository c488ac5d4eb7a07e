"""The training loop around the steps: batches, schedules, exits, logs and bf16, as stock Megatron has them."""

from __future__ import annotations

import pytest
from ranks import TERMINATE, largest_differences

LOGGED = {"tensorboard_log_interval": 1, "log_timers_to_tensorboard": True, "log_memory_to_tensorboard": True,
          "log_validation_ppl_to_tensorboard": True, "log_throughput": True, "log_params_norm": True,
          "log_num_zeros_in_grad": True, "log_interval": 1}


def test_samples_with_a_growing_batch_tensorboard_and_wandb(parity, tmp_path):
    """Counted in samples, with a batch that doubles twice, until the exit interval; the last rank alone writes values."""
    model = {
        "train_iters": None, "train_samples": 128, "step_batch_size_schedule": "0:4 1024:8 2K:16", "global_batch_size": None,
        "lr_decay_samples": 128, "lr_decay_style": "cosine", "lr_warmup_samples": 16, "exit_interval": 14, "eval_interval": 7,
        "eval_iters": 2, "check_for_spiky_loss": True, "tensorboard_dir": tmp_path, "wandb_project": "parity",
        "wandb_exp_name": "one", "wandb_save_dir": tmp_path, **LOGGED,
    }
    run = parity.check(2, 3, **model)
    reference = parity.stock(2, **model)
    assert len(run.steps[0]) == 14
    assert {value for (name, _), value in run.scalars[-1].items() if name == "batch-size"} == {4, 8, 16}
    assert not any(run.scalars[:-1]), "a rank beside the last one wrote to TensorBoard"
    ours, theirs = run.scalars[-1], reference.scalars[-1]
    measured = ("-time", "mem", "throughput", "iteration-time")
    same = [key for key in theirs if not any(word in key[0] for word in measured)]
    assert {"lm loss", "grad-norm", "params-norm", "num-zeros", "learning-rate", "load_balancing_loss", "batch-size",
            "lm loss validation", "lm loss validation ppl", "wandb/lm loss", "wandb/grad-norm"} <= {name for name, _ in same}
    for key in same:
        rel = 0.02 if "num-zeros" in key[0] else 1e-5
        assert ours[key] == pytest.approx(theirs[key], rel=rel), key


@pytest.mark.parametrize("rank", [0, 3])
def test_a_signal_to_any_rank_ends_all_with_a_checkpoint(parity, tmp_path, rank):
    save = tmp_path / "saved"
    run = parity.disaggregated(
        2, 2, env={TERMINATE: f"{rank}:5"}, exit_signal_handler=True, save=save, save_interval=100,
        no_save_optim=True,
    )
    assert [len(steps) for steps in run.steps] == [5] * 4
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "5"


def test_a_time_that_is_over_ends_all_ranks_with_a_checkpoint(parity, tmp_path):
    """Megatron counts whole minutes; less than none is over at once."""
    save = tmp_path / "saved"
    run = parity.disaggregated(2, 1, exit_duration_in_mins=-1, save=save, save_interval=100, no_save_optim=True)
    assert [len(steps) for steps in run.steps] == [1] * 3
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1"


@pytest.mark.slow
def test_bf16(parity):
    """As near to stock Megatron as two of its own expert-parallel sizes are to each other."""
    model = {"bf16": True, "use_distributed_optimizer": True, "overlap_grad_reduce": True}
    halves, whole = parity.stock(2, **model), parity.stock(2, expert_model_parallel_size=1, **model)
    run = parity.disaggregated(2, 2, **model)
    own, ours = largest_differences(halves.steps[0], whole.steps[0]), largest_differences(run.steps[0], halves.steps[0])
    print("bf16: stock's own spread of loss and gradient norm", own, "ours", ours)
    assert 0 < own[0] < 0.01
    assert ours[0] <= own[0] and ours[1] <= own[1]
