#!/usr/bin/env python3
"""How long planning takes as GPUs grow: two kinds up to 4096 GPUs, three kinds up to 128.

The model is Mixtral 8x7B's shape with 4096 tokens, on A100s and V100s (and A40s), priced from the device table. Prints
wall and processor seconds of the whole answer that `hetermoe plan` gives (the search, the pools alone, the baselines, a
search without a node of each pool), processor seconds of the first search alone, the growth with the number of GPUs, and the
targets: 512 GPUs of two kinds in 10 s, 4096 in 60 s, 128 of three kinds in 60 s, on two cores. Each cluster is planned twice:
without host seconds, which data sheets do not have, and with those that one run on H200s had, as profiles would tell them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import product
from typing import Any

from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.cost.cluster import Cluster, Kind, cluster_from_document, kinds_of
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.planner.advice import alone, baselines
from megatron_hetermoe.planner.options import Question
from megatron_hetermoe.planner.search import after_losing_a_node, search
from megatron_hetermoe.planner.staged import divisions

MODEL = ModelShape(
    layers=32, moe_layers=tuple(range(1, 33)), experts=8, topk=2, hidden=4096, expert_ffn=14336, dense_ffn=14336,
    shared_expert_ffn=0, gated=True, heads=32, query_groups=8, head_dim=128, tied_embeddings=False, sequence=4096,
)
KINDS = {"new": ("A100-SXM", 80), "old": ("V100-SXM2", 32), "middle": ("A40", 48)}
CASES = ((("new", "old"), 64), (("new", "old"), 512), (("new", "old"), 4096), (("new", "old", "middle"), 128))
TARGETS = {(2, 512): 10, (2, 4096): 60, (3, 128): 60}
NODE = 8  # GPUs
HOST_SECONDS = {"attention": (1.0e-3, 1.5e-3), "attention_core_recomputed": (1.0e-3, 2.0e-3), "expert": (0.1e-3, 0.15e-3),
                "expert_task": (1.0e-3, 1.4e-3), "head": (0.4e-3, 0.5e-3), "embedding": (0.2e-3, 0.2e-3)}
CHANNEL_HOST = (1.4e-3, 2.2e-3)  # of a transfer of one tensor and of two


class Hosted:
    """A kind of GPU, with the seconds that its host takes to queue tasks known."""

    host_is_known = has_host = True

    def __init__(self, kind: Kind):
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kind, name)

    def host(self, part: str, recompute: str) -> tuple[float, float]:
        """Seconds in which the host queues a part, as ``cost.profile.Profile.host`` names it."""
        forward, backward = HOST_SECONDS["attention_core_recomputed" if (part, recompute) == ("attention", "core_attn") else part]
        return forward, backward + (forward if recompute == "full" else 0)


def cluster_of(names: tuple[str, ...], gpus: int) -> Cluster:
    """That many GPUs, an equal part of each kind as far as nodes allow."""
    nodes = gpus // NODE
    counts = [nodes // len(names) + (index < nodes % len(names)) for index in range(len(names))]
    link = {"gb_per_s": 100, "latency_us": 15}
    return cluster_from_document({"pools": {
        name: {"kind": KINDS[name][0], "memory_gb": KINDS[name][1], "nodes": count, "gpus_per_node": NODE,
               "intra_node": {"gb_per_s": 200, "latency_us": 8}, "inter_node": link}
        for name, count in zip(names, counts)}}, "benchmark")


def asked(names: tuple[str, ...], gpus: int, hosts_known: bool) -> tuple[Question, Cluster, dict[str, Kind]]:
    """What the planner is asked: eight microbatches for each GPU of the newest kind, as far as it is a whole number of them."""
    cluster = cluster_of(names, gpus)
    question = Question(MODEL, "fp16", 1, 8 * cluster.pools["new"].gpus, 32_000, tensor=(1, 2, 4, 8), expert_tensor=(1, 2, 4),
                        stage_layers=((), *divisions(MODEL)))
    kinds = kinds_of(cluster, MODEL, "fp16", Notes())
    if not hosts_known:
        return question, cluster, kinds
    pools = {name: replace(pool, channel_host=CHANNEL_HOST) for name, pool in cluster.pools.items()}
    return question, replace(cluster, pools=pools), {name: Hosted(kind) for name, kind in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=4096, help="leave out clusters with more GPUs")
    most = parser.parse_args().most
    before: dict[tuple[int, bool], tuple[int, float]] = {}
    print("kinds   GPUs  batch  hosts    wall s   cpu s  search  target  growth  best")
    for (names, gpus), hosts_known in product(CASES, (False, True)):
        if gpus > most:
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        question, cluster, kinds = asked(names, gpus, hosts_known)
        found = search(question, cluster, kinds)
        searched = time.process_time() - cpu
        baselines(found.best[0])
        alone(question, cluster, kinds)
        after_losing_a_node(question, cluster, kinds, found.best[0])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        growth = ""
        if (len(names), hosts_known) in before:
            fewer, took = before[len(names), hosts_known]
            growth = f"{cpu / took:.1f}x for {gpus // fewer}x"
        before[len(names), hosts_known] = (gpus, cpu)
        hosts, best = "known" if hosts_known else "unknown", found.best[0].option.describe()
        print(f"{len(names):5} {gpus:6} {question.global_batch:6}  {hosts:7} {wall:7.1f} {cpu:7.1f} {searched:7.1f} "
              f"{TARGETS.get((len(names), gpus), ''):>7}  {growth:>6}  {best}", flush=True)


if __name__ == "__main__":
    main()
