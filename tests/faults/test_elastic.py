"""A run that lost ranks, or got more, goes on from its checkpoint under another plan as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from models import tiny
from ranks import assert_same_steps, run_ranks

from megatron_hetermoe.cli.elastic import fitted
from megatron_hetermoe.cli.output import write_plan
from megatron_hetermoe.cli.words import with_plan
from megatron_hetermoe.config.errors import UsageError

PLACEMENT = {"experts": 8, "layers": {"all": {"a0": [0], "e0": ["1-3"], "e1": ["4-7"]}}}
LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2",
          "--hetermoe-stall-timeout", "3"]
OPTIMIZERS = {"adam": {}, "distributed": {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}}


def flags(folder, **changed):
    return [*LAYOUT, "--hetermoe-placement", str(folder / "placement.json"),
            *tiny(train_iters=7, save=folder / "run", save_interval=2, **changed)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """For each optimizer the folder of a run of two and two ranks that was killed after its save of step 4, and the
    steps of one that was not."""
    made = {}

    def make(optimizer):
        if optimizer not in made:
            folder = tmp_path_factory.mktemp(optimizer)
            (folder / "placement.json").write_text(json.dumps(PLACEMENT))
            whole = run_ranks(flags(folder, **OPTIMIZERS[optimizer]), 4, cwd=folder).check()
            subprocess.run(["rm", "-r", str(folder / "run")], check=True)
            run = run_ranks(flags(folder, **OPTIMIZERS[optimizer]), 4, cwd=folder,
                            env={"HETERMOE_TEST_FAULT": "kill:3:save-done:2"})
            assert run.exit_codes == [3, 3, 3, -9]
            made[optimizer] = folder, whole.steps[0]
        return made[optimizer]

    return make


@pytest.mark.parametrize(
    "optimizer, attention, expert, uses, said",
    [("adam", 2, 1, (2, 1), "1 expert ranks in place of 2"),
     pytest.param("adam", 1, 2, (1, 2), "1 attention ranks in place of 2", marks=pytest.mark.slow),
     pytest.param("adam", 4, 3, (4, 3), "4 attention ranks in place of 2", marks=pytest.mark.slow),
     pytest.param("adam", 3, 2, (2, 2), "1 attention ranks stay idle", marks=pytest.mark.slow),
     pytest.param("distributed", 1, 1, (1, 1), "1 expert ranks in place of 2", marks=pytest.mark.slow),
     pytest.param("distributed", 2, 3, (2, 3), "3 expert ranks in place of 2", marks=pytest.mark.slow)],
)
def test_the_loss_goes_on(tmp_path, killed, summary, optimizer, attention, expert, uses, said):
    folder, whole = killed(optimizer)
    argv = flags(folder, **OPTIMIZERS[optimizer])
    found = fitted(argv, attention, expert)
    assert (found.plan.attention_ranks, found.plan.expert_ranks) == uses
    assert said in "; ".join(found.said)
    write_plan(found.plan, tmp_path / "plan.json")
    words = [word if word != str(folder / "run") else str(tmp_path / "again") for word in argv]
    run = run_ranks(with_plan([*words, "--load", str(folder / "run")], str(tmp_path / "plan.json")), sum(uses),
                    cwd=tmp_path).check()
    for steps in run.steps:
        assert_same_steps(steps, whole[4:], rel=1e-5)
    summary.append(("lost", "both", f"{optimizer} {attention}+{expert}", 0.0, "resumed under another plan"))


@pytest.mark.parametrize("attention, expert, stages", [
    pytest.param(2, 3, 2, marks=pytest.mark.slow), (1, 2, 1)])
def test_a_pipelines_loss_goes_on(tmp_path, attention, expert, stages):
    """Two stages of one attention and two expert ranks: they stay two where each role has a rank for both, or become one."""
    model = dict(train_iters=4, num_layers=3, save=tmp_path / "run", save_interval=2, use_distributed_optimizer=True,
                 dist_ckpt_optim_fully_reshardable=True)
    argv = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "4",
            *tiny(**model, pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=2)]
    whole = next(steps for steps in run_ranks(argv, 6, cwd=tmp_path).check().steps if steps[0].loss)
    found = fitted([*argv, "--ckpt-step", "2"], attention, expert)
    assert (found.plan.attention_ranks, found.plan.expert_ranks, found.plan.stages) == (attention, 2, stages)
    write_plan(found.plan, tmp_path / "plan.json")
    words = with_plan([*argv, "--load", str(tmp_path / "run"), "--ckpt-step", "2"], str(tmp_path / "plan.json"))
    run = run_ranks(words, attention + 2, cwd=tmp_path).check()
    speaking = [steps for steps in run.steps if steps[0].loss]
    assert len(speaking) == (attention + 2) // stages
    for steps in speaking:
        assert_same_steps(steps, whole[2:], rel=1e-5)


@pytest.mark.slow
def test_an_optimizer_that_only_its_layout_reads_is_named(tmp_path):
    """As Megatron saves the distributed optimizer where nothing is said."""
    model = {"train_iters": 2, "use_distributed_optimizer": True}
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks"]
    run_ranks([*layout, "2", *tiny(save=tmp_path / "run", save_interval=2, **model)], 3, cwd=tmp_path).check()
    run = run_ranks([*layout, "1", *tiny(load=tmp_path / "run", **model)], 2, cwd=tmp_path)
    assert run.exit_codes == [2, 2] and "--dist-ckpt-optim-fully-reshardable" in run.output[0]
    assert "the optimizer's state in" in run.output[0] and "is of another layout" in run.output[0]


def test_without_a_plan_to_start_from(tmp_path):
    for argv, said in (
        (["--save", str(tmp_path)], "no checkpoint is in"), ([], "names no checkpoint"),
        (["--load", str(tmp_path), "--ckpt-step", "3"], "cannot be read, so what layout"),
        (["--load", str(tmp_path), "--ckpt-step", "x"], "must be a whole number"),
    ):
        with pytest.raises(UsageError, match=said):
            fitted(argv, 1, 1)


def recipe(folder):
    """A recipe of two and one ranks, three steps of which are to be made."""
    words, named = tiny(train_iters=4, global_batch_size=4, save=folder / "run", save_interval=2), {}
    for word in words:
        if word.startswith("--"):
            named[name := word] = True
        else:
            named[name] = word
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"MODEL_ARGS": named, "HETERMOE": {"attention-ranks": 2, "expert-ranks": 1}}))
    return str(path)


def hetermoe(folder, *words):
    return subprocess.run([sys.executable, "-m", "megatron_hetermoe", *words], cwd=folder, capture_output=True, text=True,
                          timeout=300)


@pytest.mark.slow
def test_train_goes_on_with_what_is_there(tmp_path):
    path = recipe(tmp_path)
    first = hetermoe(tmp_path, "train", path, "--", "--exit-interval", "2")
    assert first.returncode == 0, first.stderr
    fit = hetermoe(tmp_path, "elastic", path, "--attention-ranks", "1", "--expert-ranks", "1", "--out", "plan.json", "--json")
    assert fit.returncode == 0 and json.loads(fit.stdout)["attention_ranks"] == 1, fit.stderr
    again = hetermoe(tmp_path, "train", path, "--elastic", "1", "1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "elastic: 1 attention ranks in place of 2" in again.stdout
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "4"
    nothing = hetermoe(tmp_path, "elastic", path, "--attention-ranks", "0", "--expert-ranks", "1", "--out", "plan.json")
    assert nothing.returncode == 2 and "at least one of each role" in nothing.stderr and "Traceback" not in nothing.stderr
