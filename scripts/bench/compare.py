"""Compares ways to train one model on the same mixed cluster: here one GPU in shares of the Multi-Process Service.

    scripts/bench/compare.py --out cells.jsonl [--models D1] [--lengths 4096 8192] [--repeats 2]

Fast ranks (attention) have flash attention, slow ranks (experts) the memory-efficient kernel, and each has its pool's share of
a GPU. On one GPU that is 25% for all: 20% would differ from it about as V100 from A40, but cuBLAS computes some products wrongly
with 26 multiprocessors of an H200 (and with 36, 38, 40, 46, 50, 52 and 58; right with 30, 32, 42, 48, 62 and 66). On two GPUs, one
a pool, --shares 33 25 has about that difference. A cell whose loss is no number is not counted.

First every rank is profiled while all run, and the channel between the pools; the planner's placements and all
predictions come from that. Cells are interleaved, a repetition of all before the next; each is a line of the output file,
and what is there is not measured again. The table gives medians over repetitions of the median step (optimizer
included, the first ones left out) with their spread, as sequences a second, what was predicted, and the ratios
that matter: over stock expert parallelism on all ranks, and over the sum of what the two pools do alone.

NCCL must let ranks share a GPU (2.30; preload it where torch's is older).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cells
import lab
from lab import Rank
from models import MODELS, VOCABULARY, model_flags, model_shape, words
from prices import Prices, price, take_profiles
from systems import FAST, KERNELS, NAMES, PLANNED, SLOW, System, planned, systems

WARM_UP = 4  # steps left out: routing is uneven at first, and graphs are captured


@dataclass(frozen=True)
class Machine:
    """What stands for the cluster.

    Attributes:
        shares: of a GPU for a rank of each pool, in percent.
        gpus: the pools' ranks are on one together, or on one each.
    """

    shares: dict[str, int]
    gpus: int

    def ranks(self, pools: Sequence[str]) -> list[Rank]:
        """Virtual GPUs of these pools."""
        return [Rank(self.shares[pool], KERNELS[pool], pool, (FAST, SLOW).index(pool) % self.gpus) for pool in pools]


def measure(system: System, flags: Sequence[str], machine: Machine, limit: float) -> dict:
    """Trains once; returns the cell's figures, or why there are none."""
    ranks = machine.ranks(system.pools)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "record")
        script = Path(__file__).with_name("rank.py")
        ended = lab.run(ranks, lambda index: [
            script, record, ranks[index].kernel, str(limit - 10), *flags,
            *system.flags(ranks[index].kernel)], limit, system.blocks)
        if ended.failure:
            return ended.failure
        records = [[json.loads(line) for line in Path(f"{record}.{rank}").read_text().splitlines()]
                   for rank in range(len(ranks))]
    if not all(math.isfinite(step["loss"]) for step in records[-1]):
        return {"failed": "the loss is no number", "loss": [step["loss"] for step in records[-1]]}
    # A step is as long as on the rank where it takes longest.
    steps = [max(step["seconds"] for step in at_once) for at_once in zip(*records)]
    return {
        "seconds": statistics.median(steps[WARM_UP:]), "steps": steps, "loss": [step["loss"] for step in records[-1]],
        "memory": [max(step["memory"] for step in of_rank) for of_rank in records],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["D1"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096])
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME",
                        help=f"of {', '.join(map(repr, NAMES))}")
    parser.add_argument("--ranks", nargs=2, type=int, default=(2, 2), metavar=("FAST", "SLOW"), help="of each pool")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--shares", nargs=2, type=int, default=(25, 25), metavar=("FAST", "SLOW"),
                        help="percent of a GPU for a rank of each pool")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1, help="one for all ranks, or one for each pool")
    parser.add_argument("--memory-gb", nargs=2, type=float, default=(16, 20), metavar=("FAST", "SLOW"),
                        help="that a rank of each pool may take, for the planner")
    parser.add_argument("--profile-lengths", nargs="+", type=int, help="to profile at (default: --lengths)")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="record the tasks of disaggregated cells there")
    parser.add_argument("--no-graphs", action="store_true", help="disaggregated cells without CUDA graphs")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a cell may take")
    args = parser.parse_args()
    done = cells.read(args.out)
    keys = set(map(cells.key, done))
    prices = {(model, length): _prices(args, model, length) for model in args.models for length in args.lengths}
    for repeat in range(args.repeats):
        for (model, length), priced in prices.items():
            for name in args.systems:
                if (model, length, tuple(args.ranks), name, repeat) in keys or name not in priced.predicted:
                    continue
                cell = {"model": model, "length": length, "ranks": args.ranks, "system": name, "repeat": repeat,
                        "batch": args.batch, "predicted": priced.predicted[name],
                        **_cell(args, priced, model, length, name)}
                done.append(cell)
                cells.append(args.out, cell)
                print(model, length, name, cell.get("seconds") or cell, "predicted", cell["predicted"], flush=True)
    print(cells.table(done))
    return 0


def _cell(args: argparse.Namespace, priced: Prices, model: str, length: int, name: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        if name in PLANNED:
            system = planned(priced.plans[name], Path(folder), _ours(args))
        else:
            system = systems(*args.ranks, _ours(args))[name]
        flags = words(model_flags(model, length, args.batch))
        if args.trace and "--hetermoe" in system.flags(KERNELS[FAST]):
            cell = f"{model}-{length}-{'-'.join(map(str, args.ranks))}-{name.replace(', ', '-')}"
            flags += ["--hetermoe-trace", str(args.trace / cell)]
        figures = measure(system, flags, _machine(args), args.limit)
    return {**figures, "pools": system.pools}


def _machine(args: argparse.Namespace) -> Machine:
    return Machine(dict(zip((FAST, SLOW), args.shares)), args.gpus)


def _ours(args: argparse.Namespace) -> tuple[str, ...]:
    """Flags of all disaggregated cells."""
    return () if args.no_graphs else ("--hetermoe-cuda-graphs",)


def _prices(args: argparse.Namespace, model: str, length: int) -> Prices:
    """Profiles the model, once for all its lengths, beside the output file."""
    lengths = sorted(args.profile_lengths or args.lengths)
    fast, slow = args.ranks
    ranks = _machine(args).ranks((FAST,) * fast + (SLOW,) * slow)
    flags = model_flags(model, lengths[-1], args.batch)
    memory = {pool: size * 1e9 for pool, size in zip((FAST, SLOW), args.memory_gb)}
    cluster = take_profiles(
        args.out.with_name(f"{args.out.stem}-{model}-{fast}-{slow}"), flags, ranks, lengths, memory, args.limit, _ours(args))
    return price(cluster, model_shape(model, length), args.batch, VOCABULARY)


if __name__ == "__main__":
    sys.exit(main())
