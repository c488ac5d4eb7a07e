"""``hetermoe doctor`` on this machine, alone and with several ranks. What it makes of facts: tests/unit/test_diagnosis."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest

from megatron_hetermoe.cli.main import main
from megatron_hetermoe.runtime import machine


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "MASTER_ADDR", "HETERMOE_POOL"):
        monkeypatch.delenv(name, raising=False)


def ranks(count, *words, started=None, **env):
    """(exit codes, outputs) of the command on ranks of two nodes, of which the first ``started`` are started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, **env, "WORLD_SIZE": str(count), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen([sys.executable, "-m", "megatron_hetermoe", "doctor", *words], text=True,
                         env={**common, "RANK": str(rank), "SLURMD_NODENAME": f"node{rank}"},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(count if started is None else started)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], outputs


def test_alone(capsys, tmp_path):
    assert main(["doctor", "--json", "--shared-dir", str(tmp_path / "new")]) == 0
    answer = json.loads(capsys.readouterr().out)
    (one,) = answer["machines"]
    assert one["python"] == sys.version.split()[0] and one["packages"]["torch"].startswith("2.")
    assert {"Python", "torch", "megatron-core"} <= {finding["subject"] for finding in answer["findings"]}
    assert list((tmp_path / "new").iterdir()) == []


def test_the_table_and_exit_code_1_when_training_would_fail(capsys, monkeypatch):
    here = machine.this_machine(0, 0, None)
    monkeypatch.setattr(machine, "this_machine", lambda *_: dataclasses.replace(here, python="3.9.1"))
    assert main(["doctor"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("1 rank on 1 machine") and "error" in said and "3.9.1" in said and "3.12" in said


def test_a_folder_that_cannot_be_written(capsys):
    assert main(["doctor", "--shared-dir", "/proc/nothing"]) == 2
    assert "cannot write there" in capsys.readouterr().err


def test_a_time_limit_that_is_none(capsys):
    assert main(["doctor", "--timeout", "0"]) == 2
    assert "--timeout is 0; it must be 1 or more seconds" in capsys.readouterr().err


def test_two_ranks_measure_what_lies_between_them_and_one_prints(tmp_path):
    codes, outputs = ranks(2, "--json", "--shared-dir", str(tmp_path), HETERMOE_PLATFORM="cpu")
    assert codes == [0, 0], outputs
    assert outputs[1][0] == ""
    answer = json.loads(outputs[0][0])
    assert [(one["source"], one["target"], one["backend"]) for one in answer["transfers"]] == [
        (1, 0, "gloo"), (0, 1, "gloo")]
    assert all(one["bandwidth"] > 1e6 for one in answer["transfers"])
    said = {finding["subject"]: finding["what"] for finding in answer["findings"]}
    assert said["shared folder"] == "all ranks see it" and "at best over gloo" in said["bandwidth"]
    assert list(tmp_path.iterdir()) == []


def test_srun_without_an_address_is_one_message(capsys, monkeypatch):
    step = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")  # so that what the command sets is taken back
        monkeypatch.delenv(name)
    assert main(["doctor"]) == 2
    assert "MASTER_ADDR and MASTER_PORT not set" in capsys.readouterr().err


def test_ranks_that_do_not_come_are_named(tmp_path):
    codes, outputs = ranks(3, "--timeout", "5", "--shared-dir", str(tmp_path), started=1)
    assert codes == [2] and "processes 1, 2 of 3 have not come within 5 s: look at" in outputs[0][1]
    assert list(tmp_path.iterdir()) == []
