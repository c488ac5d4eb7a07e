"""Which rank a process is, by what its launcher says."""

import pytest

from megatron_hetermoe.cli.place import first_host, place_of_rank

SRUN = {"SLURM_JOB_ID": "70123", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1"}


def test_torchrun_says_all():
    said = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert place_of_rank({**said, "HOME": "/", **SRUN}) == said


def test_srun_has_names_of_its_own():
    assert place_of_rank(SRUN) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "20123",
    }
    kept = place_of_rank({**SRUN, "MASTER_ADDR": "n1", "MASTER_PORT": "1"})
    assert (kept["MASTER_ADDR"], kept["MASTER_PORT"]) == ("n1", "1")


@pytest.mark.parametrize("environ", [
    {}, {"RANK": "0"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
    {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"},  # a batch script, which starts the steps
])
def test_alone(environ):
    assert place_of_rank(environ) is None


@pytest.mark.parametrize("nodes, first", [
    ("n1", "n1"), ("n1,n2", "n1"), ("gpu[07-09,12],cpu1", "gpu07"), ("a[3]-x,b", "a3-x"), ("rack1-gpu[1,3]", "rack1-gpu1"),
])
def test_first_host(nodes, first):
    assert first_host(nodes) == first
