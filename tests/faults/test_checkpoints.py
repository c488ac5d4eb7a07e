"""A save that was cut off leaves the one before; damage is found when loading, and named."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from models import tiny
from ranks import assert_same_steps, run_ranks

from megatron_hetermoe.mcore.checkpoints import _other_shards

LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1",
          "--hetermoe-stall-timeout", "3"]
TRACKER = "latest_checkpointed_iteration.txt"
MOMENTS = ("save", "save-files", "save-written", "save-sealing", "save-tracker", "save-done")


def train(folder, *, fault=None, check=True, **flags):
    env = {"HETERMOE_TEST_FAULT": fault} if fault else {}
    run = run_ranks([*LAYOUT, *tiny(**{"global_batch_size": 2, "train_iters": 6, **flags})], 2, cwd=folder, env=env)
    return run.check() if check else run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of iterations 2 and 4, and the steps of a run that was not interrupted, six of them."""
    folder = tmp_path_factory.mktemp("saved")
    run = train(folder, save=folder / "run", save_interval=2)
    shutil.rmtree(folder / "run" / "iter_0000006")
    (folder / "run" / TRACKER).write_text("4")
    return folder / "run", run.steps


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def resumed(folder, copy, steps, start):
    """A resume goes on as the run that was not interrupted."""
    run = train(folder, load=copy)
    for rank in range(2):
        assert_same_steps(run.steps[rank], steps[rank][start:])


def test_a_save_lists_all_its_files(saved):
    for iteration in (2, 4):
        folder = saved[0] / f"iter_{iteration:07d}"
        files = json.loads((folder / "integrity.json").read_text())["files"]
        assert files.keys() == {path.name for path in folder.iterdir()} - {"integrity.json"}


def test_stock_megatron_accepts_the_manifest(saved, tmp_path):
    flags = tiny(
        load=saved[0], finetune=True, no_load_optim=True, no_load_rng=True, train_iters=1, verify_integrity=True
    )
    run_ranks(flags, 1, cwd=tmp_path).check()


@pytest.mark.parametrize(
    "victim, moment",
    [(0, "save-tracker"), (1, "save-files"),
     *(pytest.param(victim, moment, marks=pytest.mark.slow) for victim in (0, 1) for moment in MOMENTS
       if (victim, moment) not in {(0, "save-tracker"), (1, "save-files")}
       and (victim == 0 or moment not in ("save-written", "save-sealing", "save-tracker")))],
)
def test_a_kill_during_a_save_leaves_one_to_go_on_from(saved, tmp_path, summary, victim, moment):
    """Killed in the second save; the resume is exact, from whichever save was complete."""
    _, steps = saved
    run = train(tmp_path, fault=f"kill:{victim}:{moment}:2", check=False, save=tmp_path / "run", save_interval=2)
    assert run.exit_codes[victim] == -9 and run.exit_codes[1 - victim] == 3
    whole = 4 if moment in ("save-tracker", "save-done") else 2
    resumed(tmp_path, tmp_path / "run", steps, whole)
    summary.append(("kill", ("attention", "expert")[victim], moment, 0.0, f"resumed exactly from step {whole}"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.slow
def test_saves_in_the_background_are_sealed_too(saved, tmp_path):
    train(tmp_path, save=tmp_path / "run", save_interval=2, async_save=True, async_strategy="mcore")
    assert (tmp_path / "run" / TRACKER).read_text() == "6"
    test_a_save_lists_all_its_files((tmp_path / "run", None))
    (tmp_path / "run" / TRACKER).write_text("4")
    resumed(tmp_path, tmp_path / "run", saved[1], 4)


@pytest.mark.parametrize(
    "hetermoe, flags, said",
    [([], {"async_strategy": "nvrx"}, "needs nvidia-resiliency-ext, which is not installed"),
     (["--hetermoe-on-save-failure", "continue"], {"async_strategy": "mcore"}, "leave one out"),
     (["--hetermoe-on-save-failure", "never"], {}, "it must be one of stop, continue")],
)
def test_saves_that_are_refused(tmp_path, hetermoe, flags, said):
    run = run_ranks([*LAYOUT, *hetermoe, *tiny(global_batch_size=2, async_save=True, save=tmp_path / "run", **flags)], 2,
                    cwd=tmp_path)
    assert run.exit_codes == [2, 2] and said in run.output[0], run.output[0][-2000:]


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.unlink()], ids=["flip", "cut", "missing"])
@pytest.mark.parametrize("name", ["__1_0.distcp", pytest.param(".metadata", marks=pytest.mark.slow)])
def test_damage_is_named_and_the_one_before_offered(copy, tmp_path, damage, name):
    path = copy / "iter_0000004" / name
    damage(path)
    run = train(tmp_path, load=copy, check=False)
    assert run.exit_codes == [2, 2]
    assert f"the checkpoint of iteration 4 is damaged: {path} is not" in run.output[0]
    assert "load iteration 2, which is whole: add --ckpt-step 2" in run.output[0]
    assert "Traceback" not in "".join(run.output) and "hetermoe: 1 problem" not in run.output[1]


def test_the_one_before_loads(copy, saved, tmp_path):
    flip(copy / "iter_0000004" / "__0_0.distcp")
    run = train(tmp_path, load=copy, ckpt_step=2)
    assert_same_steps(run.steps[0], saved[1][0][2:])


def test_no_checkpoint_is_whole(copy, tmp_path):
    for iteration in (2, 4):
        cut(copy / f"iter_{iteration:07d}" / "__0_0.distcp")
    (copy / TRACKER).write_text("")
    run = train(tmp_path, load=copy, check=False)
    assert run.exit_codes == [2, 2] and f"no checkpoint in {copy} is whole" in run.output[0]


def test_a_plan_of_another_version_beside_a_checkpoint_is_a_message_for_all_ranks(tmp_path):
    """Rank 0 reads it alone: what it raised would keep the others waiting."""
    (tmp_path / "hetermoe-plan.json").write_text('{"format": 0}')
    args = SimpleNamespace(use_distributed_optimizer=True, no_load_optim=False, finetune=False)
    assert "is not a plan of format" in _other_shards(tmp_path, args, None)
