"""``hetermoe profile`` on a GPU: what queueing takes the host is there, with and without CUDA graphs, and of transfers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from models import tiny
from recipes import recipe_of

from megatron_hetermoe.cli.launch import has_gpu
from megatron_hetermoe.cost.cluster import read_cluster
from megatron_hetermoe.cost.profile import read_profile
from megatron_hetermoe.runtime import mps

ROOT = Path(__file__).parents[2]
MODEL = dict(num_layers=2, hidden_size=256, num_attention_heads=8, num_query_groups=4, seq_length=512,
             max_position_embeddings=512, moe_ffn_hidden_size=512, global_batch_size=16)

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs a GPU")


def hetermoe(folder: Path, *words: object, launcher: tuple[str, ...] = ()) -> None:
    environment = {**mps.defaults(os.environ), **os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run([sys.executable, *launcher, "-m", "megatron_hetermoe", *map(str, words)], cwd=folder, env=environment,
                           capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(ended.stdout)


@pytest.mark.parametrize("graphs", [(), ("--hetermoe-cuda-graphs",)], ids=["without", "graphs"])
def test_the_hosts_seconds_are_measured(tmp_path, graphs):
    (tmp_path / "recipe.yaml").write_text(recipe_of(tiny(**MODEL), {}))
    hetermoe(tmp_path, "profile", "recipe.yaml", "--out", "gpu.json", "--lengths", 512, "--expert-tokens", 64, 512, "--", *graphs)
    found = read_profile(tmp_path / "gpu.json")
    for part in ("attention", "attention_core_recomputed", "head"):
        assert min(found.host[part]) > 0, part
    assert all(task + each > 0 for task, each in zip(found.host["expert_task"], found.host["expert"]))
    assert all(min(seconds) > 0 for points in found.parts.values() for seconds in points.values())


def test_the_hosts_seconds_of_transfers_are_measured(tmp_path):
    link = {"gb_per_s": 1, "latency_us": 50}
    pool = {"kind": "H200-SXM", "nodes": 1, "gpus_per_node": 1, "intra_node": link, "inter_node": link}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"pools": {"new": pool, "old": pool}}))
    hetermoe(tmp_path, "profile", "--network", "--cluster", "cluster.yaml", "--out", "measured.yaml",
             launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2"))
    assert min(read_cluster(tmp_path / "measured.yaml").pools["new"].channel_host) > 0
