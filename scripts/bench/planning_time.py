#!/usr/bin/env python3
"""How long planning takes as GPUs grow: two kinds up to 4096 GPUs, three kinds up to 128.

The model is Mixtral 8x7B's shape with 4096 tokens, on A100s and V100s (and A40s), priced from the device table. Prints
wall and processor seconds of the whole answer that `hetermoe plan` gives (the search, the pools alone, the baselines, a
search without a node of each pool), processor seconds of the first search alone, the growth from row to row, and the
targets: 512 GPUs of two kinds in 10 s, 4096 in 60 s, 128 of three kinds in 60 s, on two cores.
"""

from __future__ import annotations

import argparse
import time

from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.cost.cluster import Cluster, cluster_from_document, kinds_of
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


def cluster_of(names: tuple[str, ...], gpus: int) -> Cluster:
    """That many GPUs, an equal part of each kind as far as nodes allow."""
    nodes = gpus // NODE
    counts = [nodes // len(names) + (index < nodes % len(names)) for index in range(len(names))]
    link = {"gb_per_s": 100, "latency_us": 15}
    return cluster_from_document({"pools": {
        name: {"kind": KINDS[name][0], "memory_gb": KINDS[name][1], "nodes": count, "gpus_per_node": NODE,
               "intra_node": {"gb_per_s": 200, "latency_us": 8}, "inter_node": link}
        for name, count in zip(names, counts)}}, "benchmark")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=4096, help="leave out clusters with more GPUs")
    most = parser.parse_args().most
    before: dict[int, tuple[int, float]] = {}
    print("kinds   GPUs  batch  wall s   cpu s  search  target  growth  best")
    for names, gpus in CASES:
        if gpus > most:
            continue
        cluster = cluster_of(names, gpus)
        # Eight microbatches for each GPU of the newest kind, as far as it is a whole number of them.
        batch = 8 * cluster.pools["new"].gpus
        question = Question(MODEL, "fp16", 1, batch, 32_000, tensor=(1, 2, 4, 8), expert_tensor=(1, 2, 4),
                            stage_layers=((), *divisions(MODEL)))
        wall, cpu = time.perf_counter(), time.process_time()
        kinds = kinds_of(cluster, MODEL, "fp16", Notes())
        found = search(question, cluster, kinds)
        searched = time.process_time() - cpu
        baselines(found.best[0])
        alone(question, cluster, kinds)
        after_losing_a_node(question, cluster, kinds, found.best[0])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        growth = ""
        if len(names) in before:
            fewer, took = before[len(names)]
            growth = f"{cpu / took:.1f}x for {gpus // fewer}x"
        before[len(names)] = (gpus, cpu)
        best = found.best[0].option.describe()
        print(f"{len(names):5} {gpus:6} {batch:6} {wall:7.1f} {cpu:7.1f} {searched:7.1f} {TARGETS.get((len(names), gpus), ''):>7}  "
              f"{growth:>6}  {best}", flush=True)


if __name__ == "__main__":
    main()
