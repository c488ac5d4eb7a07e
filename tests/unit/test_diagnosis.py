"""The judgement of what machines are, on faked facts: one test a finding."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from megatron_hetermoe.planner.diagnosis import (
    ERROR, GOOD, WARNING, Gpu, Machine, Transfer, diagnose, machine_from_document, machine_to_document, pairs_to_measure,
    ranks_in_words,
)

PACKAGES = {"torch": "2.11.0+cu126", "megatron-core": "0.19.2", "megatron-hetermoe": "0.1.0", "transformer-engine": "2.20",
            "apex": None}
A40 = Gpu("NVIDIA A40", (8, 6), 48 << 30, 47 << 30, "570.1", 1700, 1740, "a40")
V100 = Gpu("Tesla V100-SXM2-16GB", (7, 0), 16 << 30, 16 << 30, "570.1", 1500, 1530, "v100")
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")


def machine(rank=0, gpu=A40, **changes):
    if gpu is not None:
        gpu = dataclasses.replace(gpu, uuid=f"{gpu.uuid}-{rank}")
    return Machine(**{**dict(
        rank=rank, node=f"node{rank}", python="3.12.1", packages=PACKAGES, cuda="12.6", architectures=CU126, nccl="2.28.9",
        gpu=gpu, environment={}, sees_file=True), **changes})


def packages(**changes):
    return {**PACKAGES, **{name.replace("_", "-"): version for name, version in changes.items()}}


def found(machines, level, subject, transfers=(), failures=None):
    """The findings of a level about a subject."""
    return [one for one in diagnose(machines, transfers, failures) if one.level == level and one.subject == subject]


def test_nothing_is_wrong_with_good_machines():
    findings = diagnose([machine(0), machine(1)])
    assert {one.level for one in findings if one.subject != "apex"} == {GOOD}


def test_every_problem_says_what_to_do():
    machines = [machine(0), machine(1, V100, python="3.9.1", nccl="2.27.1", sees_file=False, packages={},
                                    architectures=("sm_80",)), machine(2, None, gpu_problem="the driver is too old")]
    findings = diagnose(machines, [Transfer(0, 1, 1e6, "nccl")], {1: "unreachable"})
    problems = [one for one in findings if one.level != GOOD]
    assert len(problems) > 12 and all(one.remedy and one.what for one in problems)
    assert [one.level for one in findings] == sorted((one.level for one in findings),
                                                     key=(ERROR, WARNING, GOOD).index)


CASES = [
    # (what is wrong with rank 1, level, subject, in what is said, in what to do)
    (dict(python="3.11.9"), ERROR, "Python", "3.11.9", "3.12"),
    (dict(packages=packages(torch=None)), ERROR, "torch", "is not there", "setup.sh"),
    (dict(packages=packages(torch="2.10.1")), ERROR, "torch", "2.10.1", "2.11 to 2.14"),
    (dict(packages=packages(torch="2.15.0")), ERROR, "torch", "2.15.0", "2.11 to 2.14"),
    (dict(packages=packages(torch="2.12.0")), ERROR, "torch", "2.11.0 on rank 0; 2.12.0 on rank 1", "one release"),
    (dict(packages=packages(megatron_core="0.18.0")), ERROR, "megatron-core", "0.18.0", ">=0.19.2"),
    (dict(packages=packages(megatron_core=None)), ERROR, "megatron-core", "is not there", "pip install"),
    (dict(packages=packages(megatron_core="0.19.3")), ERROR, "megatron-core", "versions differ", "same code"),
    (dict(packages=packages(megatron_hetermoe="0.2")), ERROR, "megatron-hetermoe", "versions differ", "same code"),
    (dict(packages=packages(transformer_engine=None)), WARNING, "transformer-engine", "2.20 on rank 0; none on rank 1",
     "--transformer-impl local"),
    (dict(packages=packages(apex="0.1")), WARNING, "apex", "none on rank 0; 0.1 on rank 1", "gradient-accumulation"),
    (dict(gpu=None), ERROR, "GPU", "none, while other ranks", "--gpus-per-node"),
    (dict(gpu=None, gpu_problem="CUDA driver version is insufficient"), ERROR, "GPU", "insufficient", "nvidia-smi"),
    (dict(nccl="2.27.1"), ERROR, "NCCL", "2.28.9 on rank 0; 2.27.1 on rank 1", "pip install"),
    (dict(sees_file=False), ERROR, "shared folder", "do not see", "--save"),
    (dict(gpu=dataclasses.replace(A40, free=20 << 30)), WARNING, "free memory", "21.5 of 51.5 GB on node1", "nvidia-smi"),
    (dict(gpu=dataclasses.replace(A40, clock=700)), WARNING, "clock", "700 of 1740 MHz", "heat"),
    (dict(environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"}), WARNING, "CUDA_DEVICE_MAX_CONNECTIONS",
     "none on rank 0; 1 on rank 1", "ENV_VARS"),
    (dict(gpu=V100), WARNING, "bf16", "V100-SXM2-16GB has none", "--fp16"),
    (dict(gpu=V100, architectures=("sm_75", "sm_80", "sm_86"), cuda="13.0"), ERROR, "kernels", "sm_70", "--cuda cu126"),
    (dict(gpu=Gpu("B200", (10, 0), 1, 1)), ERROR, "kernels", "no kernels for B200 (sm_100)", "newer CUDA"),
]


@pytest.mark.parametrize("changes, level, subject, what, remedy", CASES)
def test_what_is_wrong_with_one_rank(changes, level, subject, what, remedy):
    findings = found([machine(0), machine(1, **{"gpu": A40, **changes})], level, subject)
    assert [one for one in findings if what in one.what and remedy in one.remedy], findings
    assert all(one.where in ((), (1,)) for one in findings)
    assert not [one for one in found([machine(0), machine(1)], level, subject) if what in one.what]


def test_builds_of_one_torch_may_differ():
    """V100 needs another build than the newest GPUs do."""
    machines = [machine(0), machine(1, V100, packages=packages(torch="2.11.0+cu130"))]
    assert not found(machines, ERROR, "torch")


def test_what_is_wrong_everywhere():
    assert "is nowhere" in found([machine()], WARNING, "apex")[0].what
    assert "has none" in found([machine(nccl="")], ERROR, "NCCL")[0].what
    assert found([machine(nccl="2.28.9")], GOOD, "NCCL")[0].what == "2.28.9 is loaded; `hetermoe train --emulate` needs 2.30"
    assert found([machine(nccl="2.30.7")], GOOD, "NCCL")[0].what == "2.30.7 is loaded"
    alone = [machine(0, None, sees_file=None)]
    assert "on the CPU" in found(alone, WARNING, "GPU")[0].what
    assert not [one for one in diagnose(alone) if one.level == ERROR]
    assert not [one for one in diagnose(alone) if one.subject in ("NCCL", "apex", "bf16", "shared folder")]
    assert "--shared-dir" in found([machine(0, sees_file=None), machine(1, sees_file=None)], WARNING, "shared folder")[0].remedy


def test_ranks_that_share_a_board():
    shared = dataclasses.replace(machine(1), gpu=machine(0).gpu)
    assert found([machine(0), shared], WARNING, "GPU")[0].where == (0, 1)


@pytest.mark.parametrize("capability, architectures, runs", [
    ((7, 0), CU126, True), ((7, 0), ("sm_75", "compute_75"), False), ((7, 0), ("sm_60", "compute_60"), True),
    ((8, 9), ("sm_80",), True), ((8, 0), ("sm_86",), False), ((9, 0), ("sm_90a",), True), ((9, 0), ("sm_80",), False),
    ((10, 0), ("sm_90", "compute_90a"), False), ((12, 0), ("sm_120",), True), ((10, 3), ("sm_100",), True),
    ((8, 6), (), False),
])
def test_which_kernels_run_where(capability, architectures, runs):
    gpu = Gpu("GPU", capability, 1, 1)
    assert bool(found([machine(0, gpu, architectures=architectures)], GOOD, "kernels")) == runs
    assert bool(found([machine(0, gpu, architectures=architectures)], ERROR, "kernels")) != runs


def test_links():
    machines = [machine(0, pool="new"), machine(1, pool="new"), machine(2, V100, pool="old")]
    fast = [Transfer(0, 2, 10e9, "nccl"), Transfer(1, 2, 9e9, "nccl")]
    assert [one.what for one in found(machines, GOOD, "bandwidth", fast)] == ["new to old: 10.00 GB/s at best over nccl"]
    assert not found(machines, WARNING, "bandwidth", fast)
    (slow,) = found(machines, WARNING, "bandwidth", [fast[0], Transfer(1, 2, 4e9, "nccl")])
    assert slow.where == (1, 2) and "4.00 GB/s" in slow.what and "NCCL_SOCKET_IFNAME" in slow.remedy
    assert found(machines, WARNING, "bandwidth", [Transfer(0, 2, 0.1e9, "nccl")])
    assert not found(machines, WARNING, "bandwidth", [Transfer(0, 2, 0.1e9, "gloo")])
    assert found(machines, ERROR, "bandwidth", failures={1: "no route"})[0].where == (1,)


def test_pairs_reach_every_node_of_two_pools():
    machines = [machine(rank, pool="new" if rank < 4 else "old", node=f"n{rank // 2}") for rank in range(6)]
    assert pairs_to_measure(machines) == [(0, 4), (4, 0), (2, 4), (4, 2)]
    assert pairs_to_measure(machines[:1]) == []
    assert pairs_to_measure([machine(0), machine(1)]) == []  # one kind of GPU is one pool
    assert pairs_to_measure([machine(0, None), machine(1, None)]) == [(0, 1), (1, 0)]


def test_facts_survive_json():
    for one in (machine(3), machine(0, None)):
        assert machine_from_document(json.loads(json.dumps(machine_to_document(one)))) == one


def test_ranks_in_words():
    assert ranks_in_words((3,)) == "rank 3" and ranks_in_words((5, 0, 1, 2)) == "ranks 0-2, 5"


def test_the_ranges_are_those_of_the_installation():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    for name, inside, outside in (("torch", ("2.11.0", "2.14.9"), ("2.10.9", "2.15.0")),
                                  ("megatron-core", ("0.19.2", "0.19.9"), ("0.19.1", "0.20.0"))):
        low, high = re.search(rf'"{name}>=([\d.]+),<([\d.]+)"', setup).groups()
        assert inside[0].startswith(low) and outside[1].startswith(high)
        for version in (*inside, *outside):
            errors = found([machine(packages=packages(**{name.replace("-", "_"): version}))], ERROR, name)
            assert bool(errors) == (version in outside), version
