"""Batch scripts, with stand-ins for Slurm's commands; tests/slurm has them run on a real one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from models import tiny
from recipes import recipe_of

from megatron_hetermoe.cli.main import main
from megatron_hetermoe.cli.rank import take_place
from megatron_hetermoe.cli.words import resumed, with_plan
from megatron_hetermoe.config.errors import UsageError

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"
STAND_IN = """#!/bin/bash
{ printf '%s\\n' "${0##*/}" "$@"; env | grep -E '^(HETERMOE_POOLS|HETERMOE_FEATURES|MASTER_PORT|OMP)' | sort; echo 'the end'; } >> "$CALLS"
"""


@pytest.mark.parametrize("name", ["hetjob", "mixed"])
def test_the_scripts_that_are_shipped_are_those_of_the_command(name, monkeypatch, capsys):
    """Each says in a comment how it was made."""
    monkeypatch.chdir(ROOT)
    text = (SCRIPTS / f"{name}.sbatch").read_text()
    words = shlex.split(re.search(r"^# hetermoe (submit .*)", text, re.MULTILINE)[1])
    assert main(words) == 0
    assert capsys.readouterr().out == text


class Job:
    """A folder with a recipe and a cluster file of two pools, and what stands in for Slurm."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cluster = yaml.safe_load((SCRIPTS / "hetjob.cluster.yaml").read_text())
        argv = tiny(save="saved files")
        (folder / "my recipe.yaml").write_text(recipe_of(argv, {"attention-ranks": 2, "expert-ranks": 2}))

    def script(self, capsys, *words: str, code: int = 0) -> str:
        """What ``hetermoe submit`` prints, or with another exit code says."""
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(self.cluster))
        assert main(["submit", str(self.folder / "my recipe.yaml"), "--cluster", str(self.folder / "cluster.yaml"),
                     *words]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    def calls(self, script: str, stand_ins: dict[str, str] | None = None, code: int = 0, **env: str) -> list[list[str]]:
        """The commands that the script runs with Slurm's and others' stand-ins, each with some of its environment."""
        tools = self.folder / "bin"
        tools.mkdir(exist_ok=True)
        for name, more in {"srun": "", "scontrol": "", "sinfo": "", **(stand_ins or {})}.items():
            (tools / name).write_text(STAND_IN + more)
            (tools / name).chmod(0o755)
        calls = self.folder / "calls"
        calls.unlink(missing_ok=True)
        ended = subprocess.run(
            ["bash"], input=script, text=True, cwd=self.folder, timeout=60, capture_output=True,
            env={"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_ID": "20042",
                 "SLURM_JOB_NODELIST": "n[0-1]", **env})
        assert ended.returncode == code, ended.stderr
        text = calls.read_text() if calls.exists() else ""
        return [call.splitlines() for call in text.split("the end\n")[:-1]]


def test_words_reach_the_ranks_as_they_were(tmp_path, capsys):
    odd = "a b'c\"$HOME`x`*;#\\"
    script = Job(tmp_path).script(capsys, "--hetermoe", "'/my venv/hetermoe'", "--", "--tensorboard-dir", odd)
    (call,) = Job(tmp_path).calls(script)
    first, second = call[call.index("srun") + 1:call.index(":")], call[call.index(":") + 1:]
    assert first[:5] == ["--label", "--wait=120", "--het-group=0", "env", "HETERMOE_POOL=attention"]
    rank = ["/my venv/hetermoe", "rank", f"{tmp_path}/my recipe.yaml", "--resume", "--", "--tensorboard-dir", odd,
            "--exit-signal-handler", "--exit-signal", "SIGUSR1"]
    assert first[5:] == rank
    assert second[:-2] == ["--het-group=1", "env", "HETERMOE_POOL=expert", *rank]
    assert second[-2:] == ["MASTER_PORT=20042", "OMP_NUM_THREADS=1"]


def test_options_are_quoted(tmp_path, capsys):
    job = Job(tmp_path)
    job.cluster["slurm"] = {"comment": "it's; $(echo) #1", "exclusive": True, "mem": 0}
    script = job.script(capsys)
    options = [shlex.split(line.removeprefix("#SBATCH "))[0] for line in script.splitlines()
               if line.startswith("#SBATCH --")]
    assert options.count("--comment=it's; $(echo) #1") == 2 and options.count("--exclusive") == 2
    assert options.count("--mem=0") == 2 and options.count("--requeue") == 2


def test_mixed_nodes_are_told_apart(tmp_path, capsys):
    job = Job(tmp_path)
    job.cluster["slurm"] = {"partition": "gpu"}
    for pool in job.cluster["pools"].values():
        del pool["slurm"]
    script = job.script(capsys, "--mixed", "--hetermoe", "hetermoe")
    assert "#SBATCH --nodes=2" in script and "hetjob" not in script.split("RECIPE")[0] and "--constraint" not in script
    sinfo, srun = job.calls(script, {"sinfo": "echo n1:b; echo n0:a; echo n0:a"})
    assert sinfo[0] == "sinfo" and "n[0-1]" in sinfo
    assert srun[-4:-2] == ["HETERMOE_FEATURES=n0:a n1:b ", "HETERMOE_POOLS=attention=A40 expert=V100"]
    job.cluster["pools"]["old"]["kind"] = "A40"
    job.cluster["pools"]["old"]["memory_gb"] = 48
    assert "nothing tells nodes of attention and expert apart" in job.script(capsys, "--mixed", code=2)


@pytest.mark.parametrize("container, before", [
    ("pyxis:nvcr.io#nvidia/pytorch:25", [
        "--container-image=nvcr.io#nvidia/pytorch:25", "--container-workdir={}", "--container-mounts={}:{},/data:/d",
        "env", "HETERMOE_POOL={pool}"]),
    ("apptainer:/images/my image.sif", [
        "env", "HETERMOE_POOL={pool}", "apptainer", "exec", "--nv", "--pwd", "{}", "--bind", "{},/data:/d",
        "/images/my image.sif"]),
])
def test_containers(tmp_path, capsys, container, before):
    job = Job(tmp_path)
    (call,) = job.calls(job.script(capsys, "--container", container, "--mounts", "/data:/d"))
    for group, pool in enumerate(("attention", "expert")):
        start = call.index(f"--het-group={group}") + 1
        expected = [word.replace("{}", str(tmp_path)).replace("{pool}", pool) for word in before]
        assert call[start:start + len(before) + 2] == [*expected, "hetermoe", "rank"]
    assert job.calls(job.script(capsys).replace("CONTAINER=''", "CONTAINER=docker:x"), code=2) == []


@pytest.mark.parametrize("code, signal, requeued", [(0, True, True), (138, True, True), (2, True, False), (3, False, False)])
def test_the_job_is_queued_again_only_when_its_time_is_over(tmp_path, capsys, code, signal, requeued):
    """The signal reaches srun, and the job waits for what it does then."""
    job = Job(tmp_path)
    end = f"trap 'kill $!; exit {code}' USR1; kill -USR1 $PPID; sleep 60 & wait $!; exit 99" if signal else f"exit {code}"
    calls = job.calls(job.script(capsys), {"srun": end}, code=code)
    assert [call[0] for call in calls] == ["srun", "scontrol"][:1 + requeued]
    if requeued:
        assert calls[1][1:3] == ["requeue", "20042"]


def test_what_keeps_a_job_from_running_is_said_before_it_is_submitted(tmp_path, capsys):
    job = Job(tmp_path)
    job.cluster["pools"]["old"]["slurm"] = {"nodes": 3, "time": 86400, "account": ["us"]}
    said = job.script(capsys, "--container", "docker:x", code=2)
    for part in ("4 problems", "nodes is decided by the layout", 'as "24:00:00"', "account is ['us']",
                 "write pyxis:IMAGE or apptainer:IMAGE"):
        assert part in said
    job.cluster["pools"]["old"]["slurm"] = {}
    assert "6 ranks on pool old, which has 2 GPUs" in job.script(capsys, "--", "--hetermoe-expert-ranks", "6", code=2)
    assert "needs a checkpoint to go on from" in job.script(capsys, "--drop", "save", code=2)
    assert "does not accept these flags" in job.script(capsys, "--", "--num-leyers", "2", code=2)
    said = job.script(capsys, "--drop", "save", "--", "--sft", "--num-layers", "0", code=2)
    for part in ("hetermoe: 3 problems:", "--sft is not supported; leave it out", "needs a checkpoint", "--num-layers is 0"):
        assert part in said
    job.cluster["pools"]["third"] = job.cluster["pools"]["old"]
    assert "no plan says who uses which" in job.script(capsys, code=2)


def test_last_node_of_a_pool_may_be_partly_used(tmp_path, capsys):
    job = Job(tmp_path)
    for pool in job.cluster["pools"].values():
        pool["nodes"] = 2
    script = job.script(capsys, "--", "--hetermoe-expert-ranks", "3")
    assert "--nodes=2\n#SBATCH --ntasks=3\n#SBATCH --gpus-per-node=2" in script.partition("hetjob")[2]
    assert "leave --mixed out" in job.script(capsys, "--mixed", "--", "--hetermoe-expert-ranks", "3", code=2)


def test_recipes_that_the_nodes_will_take_are_taken_here(tmp_path, capsys):
    """Two attention ranks share matrices; and what needs devices that only the nodes have is not judged here."""
    job = Job(tmp_path)
    script = job.script(capsys, "--", "--tensor-model-parallel-size", "2", "--sequence-parallel", "--bf16")
    assert "--tensor-model-parallel-size 2" in script
    said = job.script(capsys, "--", "--tensor-model-parallel-size", "3", "--sequence-parallel", code=2)
    assert "--tensor-model-parallel-size 3 does not divide" in said


def test_a_plan_s_flags_are_added(tmp_path, capsys, monkeypatch):
    """Those with which its times were reckoned, in place of the recipe's; and its pools name the components."""
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path)
    job.script(capsys, "--hetermoe", "x")  # writes the cluster file
    recipe = str(tmp_path / "my recipe.yaml")
    (tmp_path / "my recipe.yaml").write_text(
        (tmp_path / "my recipe.yaml").read_text().replace("attention-ranks: 2", "wave: null").replace(
            "expert-ranks: 2", "groups: null"))
    assert main(["plan", recipe, "--cluster", "cluster.yaml", "--out", "plan.json", "--", "--hetermoe"]) == 0
    capsys.readouterr()
    script = job.script(capsys, "--", "--hetermoe", "--hetermoe-plan", "plan.json")
    flags = shlex.split(re.search(r"FLAGS=\((.*)\)", script)[1])
    assert flags[:3] == ["--hetermoe", "--hetermoe-plan", "plan.json"] and "--micro-batch-size" in flags
    assert set(shlex.split(re.search(r"POOLS=\((.*?)\)", script)[1])) <= {"new", "old"}


def test_an_elastic_job_asks_what_fits_its_nodes(tmp_path, capsys):
    """It starts with one node of each pool or more, and as many ranks as the plan for them has."""
    job = Job(tmp_path)
    job.cluster["pools"]["old"] |= {"nodes": 3, "slurm": {"partition": "old", "cpus-per-task": 4}}
    script = job.script(capsys, "--elastic", "--hetermoe", "hetermoe", "--", "--hetermoe-expert-ranks", "6")
    new, old = script.split("#SBATCH hetjob")
    assert "--nodes=1\n" in new and "--mincpus=2\n" in new and "--nodes=1-3\n" in old and "--mincpus=8\n" in old
    assert "ntasks" not in new + old.partition("RECIPE=")[0] and "--gpus-per-node=2" in old
    given = {"SLURM_JOB_NAME": "j", "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1", "SLURM_JOB_NUM_NODES_HET_GROUP_1": "2"}
    answer = """case "$*" in *" elastic "*) printf '{\n "attention_ranks": 2,\n "expert_ranks": 3\n}\n' ;; esac"""
    ask, run = job.calls(script, {"srun": answer}, **given)
    plan = str(tmp_path / "j-20042.plan.json")
    elastic = ask[ask.index("elastic"):]
    assert elastic[1:9] == [str(tmp_path / "my recipe.yaml"), "--resume", "--attention-ranks", "2", "--expert-ranks", "4",
                            "--out", plan]
    first, second = run[:run.index(":")], run[run.index(":"):]
    assert "--ntasks=2" in first and "--nodes=1" in first and "--ntasks=3" in second and "--nodes=2" in second
    assert first[first.index("--plan") + 1] == second[second.index("--plan") + 1] == plan
    assert [call[0] for call in job.calls(script, {"srun": "exit 2"}, code=2, **given)] == ["srun"]


def test_jobs_that_cannot_be_elastic(tmp_path, capsys):
    job = Job(tmp_path)
    assert "leave --mixed out" in job.script(capsys, "--elastic", "--mixed", code=2)
    job.cluster["pools"]["old"]["slurm"]["cpus-per-task"] = "many"
    assert "cpus-per-task is 'many'" in job.script(capsys, "--elastic", code=2)
    del job.cluster["pools"]["old"]
    job.cluster["pools"]["new"]["nodes"] = 2
    assert "one pool of attention and one of expert ranks" in job.script(capsys, "--elastic", code=2)


def test_a_job_that_has_saved_nothing_fits_the_recipe_s_own_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(tmp_path / "my recipe.yaml")
    Job(tmp_path)
    asked = ["elastic", recipe, "--attention-ranks", "1", "--expert-ranks", "2", "--out", "plan.json"]
    assert main(asked) == 2 and "no checkpoint is in saved files" in capsys.readouterr().err
    assert main([*asked, "--resume"]) == 0
    assert "1 attention ranks in place of 2" in capsys.readouterr().out
    words = with_plan(["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-wave=2", "--lr", "1"], "plan.json")
    assert words == ["--hetermoe", "--lr", "1", "--hetermoe-plan", "plan.json"]


def test_a_job_that_has_saved_fits_its_own_plan(tmp_path, capsys, monkeypatch):
    """Not the recipe's, though the last flag is to load from the same folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        recipe_of(tiny(save=tmp_path / "saved"), {"attention-ranks": 2, "expert-ranks": 2}))
    asked = ["elastic", "r.yaml", "--resume", "--attention-ranks", "2", "--expert-ranks", "3", "--out", "plan.json",
             "--", "--load", str(tmp_path / "saved")]
    assert main(asked) == 0 and "3 expert ranks in place of 2" in capsys.readouterr().out
    folder = tmp_path / "saved" / "iter_0000004"
    folder.mkdir(parents=True)
    (tmp_path / "plan.json").rename(folder / "hetermoe-plan.json")
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("4")
    assert main(asked) == 0 and "nothing changes" in capsys.readouterr().out


def test_submitting_without_slurm(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "sbatch is not on PATH" in Job(tmp_path).script(capsys, "--yes", code=2)


def test_a_rank_finds_its_place():
    environ = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "1"}
    take_place(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("3", "4", "1")
    environ["RANK"] = "7"
    take_place(environ)
    assert environ["RANK"] == "7"
    with pytest.raises(UsageError, match="no launcher has set RANK, WORLD_SIZE, LOCAL_RANK"):
        take_place({})
    with pytest.raises(UsageError, match="MASTER_PORT not set"):
        take_place({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "n0"})


def test_a_job_goes_on_from_its_own_checkpoint(tmp_path):
    argv = ["--load", "base", "--finetune", "--lr", "1", f"--save={tmp_path}"]
    assert resumed(argv) == argv
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert resumed(argv) == ["--lr", "1", f"--save={tmp_path}", "--load", str(tmp_path)]
    with pytest.raises(UsageError, match="--resume needs --save"):
        resumed(["--lr", "1"])
