"""`hetermoe profile`: what it writes is what the planner reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_hetermoe.cost.cluster import read_cluster
from megatron_hetermoe.cost.profile import read_profile

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "scripts" / "recipes" / "quickstart.yaml"


def hetermoe(*words, launcher=(), **others) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *launcher, "-m", "megatron_hetermoe", *map(str, words)],
                          env=environment, capture_output=True, text=True, timeout=300, **others)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "cpu.json"
    # Sizes far apart, so that their order does not depend on what else the machine does.
    ended = hetermoe("profile", RECIPE, "--out", path, "--kind", "this", "--lengths", 32, 1024, "--expert-tokens", 8,
                     4096, "--repeats", 3, "--", "--num-experts", "16")
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr and len(ended.stdout.splitlines()) < 20, "Megatron's own words are left out"
    return path


def test_every_part_is_measured_and_grows(profile):
    found = read_profile(profile)
    assert found.kind == "this" and found.taken_for["hidden"] == 96 and found.taken_for["precision"] == "fp32"
    assert {name: sorted(points) for name, points in found.parts.items()} == {
        "attention": [32, 1024], "attention_core_recomputed": [32, 1024], "expert": [8, 4096],
        "expert_activation_again": [8, 4096],
        "head": [64, 2048], "embedding": [64, 2048],  # of a microbatch, which has two sequences
    }
    for name in ("attention", "expert", "head"):
        short, long = (sum(found.parts[name][size]) for size in sorted(found.parts[name]))
        assert long > short, name
    assert 0 < found.optimizer < 1e-3, "seconds a parameter"
    assert set(found.host.values()) == {(0.0, 0.0)}, "on the CPU the host computes itself"
    assert len(found.expert_task) == 2 and 0 < sum(found.expert_task)


def test_the_planner_reads_it(profile, tmp_path):
    link = {"gb_per_s": 1, "latency_us": 50}
    pool = {"kind": str(profile), "nodes": 1, "gpus_per_node": 2, "memory_gb": 8, "intra_node": link, "inter_node": link}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"pools": {"new": pool, "old": pool}}))
    ended = hetermoe("plan", RECIPE, "--cluster", tmp_path / "cluster.yaml", "--", "--num-experts", "16")
    assert ended.returncode == 0, ended.stderr
    assert "predicted" in ended.stdout and "estimated" not in ended.stdout
    other = hetermoe("plan", RECIPE, "--cluster", tmp_path / "cluster.yaml", "--", "--hidden-size", "64")
    assert other.returncode == 2 and "hidden 96 there, 64 here" in other.stderr


def test_attention_is_measured_as_graphs_queue_it(tmp_path):
    """On the CPU a graph is the work itself, again."""
    path = tmp_path / "graphs.json"
    ended = hetermoe("profile", RECIPE, "--out", path, "--lengths", 32, "--expert-tokens", 8, "--repeats", 1, "--",
                     "--hetermoe-cuda-graphs")
    assert ended.returncode == 0, ended.stderr
    assert set(read_profile(path).parts["attention"]) == {32}
    recomputed = hetermoe("profile", RECIPE, "--out", tmp_path / "other.json", "--", "--hetermoe-cuda-graphs",
                          "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
    assert recomputed.returncode == 2 and "--recompute-granularity is not supported with" in recomputed.stderr


def test_nothing_is_overwritten_and_all_problems_are_named(profile):
    before = profile.read_text()
    ended = hetermoe("profile", RECIPE, "--out", profile, "--repeats", 0, "--", "--no-such-flag", "1")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    for problem in ("is there already", "--repeats must be", "--no-such-flag"):
        assert problem in ended.stderr, problem
    assert profile.read_text() == before
    ended = hetermoe("profile", "none.yaml", "--out", "no/such/profile.json", "--vocabulary", 0)
    assert ended.returncode == 2 and "hetermoe: 3 problems:" in ended.stderr


def test_the_network(tmp_path):
    link = {"gb_per_s": 1, "latency_us": 50}
    pool = {"kind": "A40", "nodes": 1, "gpus_per_node": 1, "intra_node": link, "inter_node": link}
    old = {**pool, "kind": "V100-SXM2", "gpus_per_node": 2, "memory_gb": 16}
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("# mine\n" + yaml.safe_dump({"pools": {"new": pool, "old": old}}, sort_keys=False))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = ["profile", "--network", "--cluster", cluster, "--out", tmp_path / "measured.yaml"]
    ended = hetermoe(*command, launcher=launcher)
    assert ended.returncode == 0, ended.stderr
    measured = read_cluster(tmp_path / "measured.yaml")
    assert (tmp_path / "measured.yaml").read_text().startswith(cluster.read_text())
    channel = measured.pools["old"].channel
    assert measured.pools["old"].channel_host == (0.0, 0.0)
    assert channel.sizes[0] == 4096 and channel(64 * 2**20) > 4 * channel(4096) > 0
    alone = hetermoe("profile", "--network", "--cluster", tmp_path / "measured.yaml", "--out", tmp_path / "c.yaml")
    assert alone.returncode == 2 and "WORLD_SIZE" in alone.stderr and "measured channel already" in alone.stderr
    tasks = hetermoe(*command, "--lengths", 64, "--drop", "bf16", "--", "--num-layers", "4")
    assert tasks.returncode == 2 and "--lengths, --drop, -- with --network" in tasks.stderr
