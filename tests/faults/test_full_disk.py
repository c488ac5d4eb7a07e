"""A disk that is full ends a save, on all ranks, and the run or not as the user said; a slow one ends nothing."""

from __future__ import annotations

import time

import pytest
from models import tiny
from ranks import assert_same_steps, run_ranks

LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1",
          "--hetermoe-stall-timeout", "3"]
TRACKER = "latest_checkpointed_iteration.txt"
GOING_ON = ["--hetermoe-on-save-failure", "continue"]
ROLES = ("attention", "expert")


def train(folder, *, fault=None, hetermoe=(), **flags):
    env = {"HETERMOE_TEST_FAULT": fault} if fault else {}
    return run_ranks([*LAYOUT, *hetermoe, *tiny(**{"global_batch_size": 2, "train_iters": 6, **flags})], 2, cwd=folder,
                     env=env)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Those of a run that saves nothing."""
    return train(tmp_path_factory.mktemp("plain")).check().steps


def resumed(folder, steps, start):
    run = train(folder, load=folder / "run").check()
    for rank in range(2):
        assert_same_steps(run.steps[rank], steps[rank][start:])


# In the second save: as tensors are written, and as the manifest is.
SAVES = [(1, "save-write"), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((0, "save-write"), (0, "save-sealing")))]


@pytest.mark.parametrize("victim, moment", SAVES)
def test_the_run_ends_with_one_message(tmp_path, steps, summary, victim, moment):
    run = train(tmp_path, fault=f"full:{victim}:{moment}:2", save=tmp_path / "run", save_interval=2)
    seconds = time.time() - float((tmp_path / "fired").read_text())
    assert run.exit_codes == [2, 2]
    assert f"checkpoint iter_0000004 could not be written to {tmp_path / 'run'}: rank {victim} ({ROLES[victim]}): " in (
        run.output[0])
    assert "No space left on device" in run.output[victim]
    assert "is iter_0000002" in run.output[0] and "hetermoe: 1 problem" not in run.output[1]
    assert "Traceback" not in "".join(run.output)
    assert not (tmp_path / "run" / "iter_0000004").exists()
    resumed(tmp_path, steps, 2)
    summary.append(("full", ROLES[victim], moment, seconds, f"rank {victim} named, resumed from the save before"))


@pytest.mark.parametrize("victim, moment", SAVES)
def test_the_run_goes_on(tmp_path, steps, summary, victim, moment):
    """Without the save that failed; the next one is whole, and so the one before was meanwhile."""
    run = train(tmp_path, fault=f"full:{victim}:{moment}:2", hetermoe=GOING_ON, save=tmp_path / "run",
                save_interval=2).check()
    for rank in range(2):
        assert_same_steps(run.steps[rank], steps[rank])
    assert run.output[0].count("warning: the checkpoint iter_0000004 could not be written") == 1
    assert "training goes on" in run.output[0]
    assert (tmp_path / "run" / TRACKER).read_text() == "6"
    assert not (tmp_path / "run" / "iter_0000004").exists()
    again = train(tmp_path, load=tmp_path / "run", ckpt_step=2).check()
    for rank in range(2):
        assert_same_steps(again.steps[rank], steps[rank][2:])
    summary.append(("full", ROLES[victim], moment, 0.0, "all went on, saved at the next interval"))


@pytest.mark.slow
@pytest.mark.parametrize("going_on", [False, True])
def test_a_checkpoint_that_rank_0_cannot_complete_ends_the_run(tmp_path, steps, going_on):
    run = train(tmp_path, fault="full:0:save-written:2", hetermoe=GOING_ON if going_on else (), save=tmp_path / "run",
                save_interval=2)
    assert run.exit_codes == [1, 3]
    for output in run.output:
        assert "no space is left for the checkpoint in" in output and "iter_0000002 is the last" in output
    assert (tmp_path / "run" / TRACKER).read_text() == "2"
    resumed(tmp_path, steps, 2)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_slow_disk_ends_nothing(tmp_path, steps, summary, victim):
    """One that takes longer than the time-out to write."""
    run = train(tmp_path, fault=f"slow:{victim}:save-write:2", save=tmp_path / "run", save_interval=2).check()
    assert (tmp_path / "fired").exists() and (tmp_path / "run" / TRACKER).read_text() == "6"
    assert_same_steps(run.steps[0], steps[0])
    summary.append(("slow", ROLES[victim], "save-write", 0.0, "all went on"))
