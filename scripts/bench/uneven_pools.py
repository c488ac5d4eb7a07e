#!/usr/bin/env python3
"""Pools that do not divide each other: what the planner reaches of the ideal sum of both, and of what computing alone allows.

Four fast and three slow GPUs by default, where the paper's placement, which needs M | N or N | M, loses a quarter at 4096
tokens. Times are measured ones, in milliseconds of forward and backward together: a YAML file

    D1: {flash: {25: {4096: 2.80, ...}}, efficient: {20: {...}}, expert: {25: {1024: 0.80, ...}, 20: {...}}}

with attention of one sequence, by its tokens, and one expert, by its tokens, for two sizes of GPU (here 25 and 20). A third of
each is taken as the forward pass. Links cost nothing, so the figures are bounds of what a cluster would show.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.cost.cluster import Cluster, Kind, cluster_from_document, kinds_of
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.profile import Profile, taken_for
from megatron_hetermoe.planner.advice import alone
from megatron_hetermoe.planner.options import Question
from megatron_hetermoe.planner.search import search

SHAPES = {  # Mixtral-D1 and -W1 of the paper; heads and widths are assumed
    "D1": ModelShape(
        layers=8, moe_layers=tuple(range(1, 9)), experts=24, topk=2, hidden=1024, expert_ffn=3584, dense_ffn=3584,
        shared_expert_ffn=0, gated=True, heads=16, query_groups=8, head_dim=64, tied_embeddings=False, sequence=4096),
    "W1": ModelShape(
        layers=4, moe_layers=tuple(range(1, 5)), experts=12, topk=2, hidden=2048, expert_ffn=7168, dense_ffn=7168,
        shared_expert_ffn=0, gated=True, heads=32, query_groups=8, head_dim=64, tied_embeddings=False, sequence=4096),
}
PRECISION = "bf16"
MICROBATCHES = 4  # of each fast GPU, for each slow one
VOCABULARY = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", required=True, help="the YAML file")
    parser.add_argument("--model", default="D1", choices=SHAPES)
    parser.add_argument("--fast", type=int, default=4)
    parser.add_argument("--slow", type=int, default=3)
    parser.add_argument("--sizes", nargs=2, type=int, default=(25, 20), metavar=("FAST", "SLOW"), help="GPUs of the file")
    parser.add_argument("--lengths", nargs="+", type=int, default=(4096, 8192, 16384, 32768))
    args = parser.parse_args()
    figures = yaml.safe_load(Path(args.figures).read_text())[args.model]
    print("tokens  tokens/s  over ideal sum  bound  over the paper's placement  plan")
    for length in args.lengths:
        shape = dataclasses.replace(SHAPES[args.model], sequence=length)
        with tempfile.TemporaryDirectory() as folder:
            cluster = cluster_of(args, shape, figures, Path(folder))
            kinds = kinds_of(cluster, shape, PRECISION, Notes())
        # A multiple of both, so that each pool alone shares it evenly.
        question = Question(shape, PRECISION, 1, MICROBATCHES * args.fast * args.slow, VOCABULARY)
        best = search(question, cluster, kinds).best[0]
        ideal = sum(one.tokens_per_second for one in alone(question, cluster, kinds))
        paper = best.assignment.paper_seconds
        print(f"{length:6} {best.tokens_per_second:9,.0f} {best.tokens_per_second / ideal:15.3f} "
              f"{bound(args, shape, kinds) / ideal:6.3f} {f'{paper / best.assignment.seconds:.3f}' if paper else 'none':>27}  "
              f"{best.option.describe()}", flush=True)


def cluster_of(args: argparse.Namespace, shape: ModelShape, figures: Mapping, folder: Path) -> Cluster:
    """One node of each kind, with links that cost nothing and memory that binds nothing."""
    link = {"gb_per_s": 1e5, "latency_us": 1e-3}
    pools = {}
    for name, count, size, core in zip(("fast", "slow"), (args.fast, args.slow), args.sizes, ("flash", "efficient")):
        parts = {part: {tokens: (ms / 3e3, 2 * ms / 3e3) for tokens, ms in points.items()}
                 for part, points in (("attention", figures[core][size]), ("expert", figures["expert"][size]))}
        path = folder / f"{name}.json"
        path.write_text(Profile(name, taken_for(shape, PRECISION), parts).to_json())
        pools[name] = {"kind": str(path), "nodes": 1, "gpus_per_node": count, "memory_gb": 1000, "intra_node": link,
                       "inter_node": link}
    return cluster_from_document({"pools": pools}, args.figures)


def bound(args: argparse.Namespace, shape: ModelShape, kinds: Mapping[str, Kind]) -> float:
    """Tokens a second with all attention on the fast GPUs, and experts wherever there is time, in any fractions."""
    rows = args.fast * shape.sequence * shape.topk / shape.experts  # of an expert, from a microbatch of each fast GPU
    attention = sum(kinds["fast"].attention(shape.sequence, "none"))
    fast, slow = (shape.experts * sum(kinds[name].expert(rows, "none")) for name in ("fast", "slow"))
    shared = (args.fast * attention + fast) / (args.fast + args.slow * fast / slow)
    return args.fast * shape.sequence / shape.layers / max(attention, shared)


if __name__ == "__main__":
    main()
