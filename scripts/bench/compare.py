"""Compares ways to train one model on the same mixed cluster, or on GPUs in shares of the Multi-Process Service.

    scripts/bench/compare.py --out cells.jsonl [--models D1] [--lengths 4096 8192] [--repeats 2]

Fast ranks (attention) have flash attention, slow ranks (experts) the memory-efficient kernel, and each has its pool's share of
a GPU. On one GPU that is 25% for all: 20% would differ from it about as V100 from A40, but cuBLAS computes some products wrongly
with 26 multiprocessors of an H200, as with most other numbers (docs/one-gpu.md). So all shares are checked at the models' sizes
before the first cell, and a cell whose loss is no number, or not that of the others, is not counted.

First every rank is profiled while all run, and the channel between the pools; the planner's placements and all
predictions come from that. Cells are interleaved, a repetition of all before the next; each is a line of the output file,
and what is there is not measured again, so a comparison is as many calls of the same command as it takes (--budget).
All begin with the same weights; a cell whose losses are not those of the others is marked as failed (``cells.py``).

The table gives medians over repetitions of the median step (optimizer included, the first ones left out) with their
spread, as sequences a second, and what was predicted; then ratios: over stock expert parallelism on all ranks, and over the sum
of what the two pools do alone. "Of the bound" is the step if all but compute were free, by the profiles, over the step without
its optimizer; "over EP's compute alone" compares with what expert parallelism only computes, so that no overhead of its own
counts for us. Busy shares are of a step without its optimizer too: by the profiles, and with --busy as the GPU ran kernels.

With --throttle-gbps traffic of tokens is as slow as on such a network (``throttle.py``), in predictions too.

Where ranks share a GPU, NCCL must let them (2.30; preload it where torch's is older).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cells
from hosts import Hosts
from measure import Machine, Shares, measure
from paper_models import MODELS, STEPS, VOCABULARY, model_flags, model_shape, words
from prices import Prices, measured_in, price, take_profiles
from systems import EVERYTHING, FAST, NAMES, PIPELINE, PLANNED, SLOW, System, pipelined, planned, systems

from megatron_hetermoe.cli.emulate import linear_layers

BUDGET = 530  # seconds
_WHY_NOT = {
    PIPELINE: "stock Megatron has as many ranks in each stage, and a whole number of microbatches",
    **dict.fromkeys(PLANNED, "no plan fits into --memory-gb"),
    EVERYTHING: "waves overlap where a step has two microbatches, and --memory-gb has room for them",
}


class Point(NamedTuple):
    """What is to be measured: a system in a setting, the repeat-th time."""

    model: str
    length: int
    system: str
    repeat: int


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["D1"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096])
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME",
                        help=f"of {', '.join(map(repr, NAMES))}")
    parser.add_argument("--ranks", nargs=2, type=int, default=(2, 2), metavar=("FAST", "SLOW"), help="of each pool")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a microbatch")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16", help="fp16 for GPUs older than Ampere")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--shares", nargs=2, type=int, default=(25, 25), metavar=("FAST", "SLOW"),
                        help="percent of a GPU for a rank of each pool")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1, help="one for all ranks, or one for each pool")
    parser.add_argument("--hosts", nargs="+", metavar="HOST", help="of a real cluster in place of shares: one for each GPU, the fast "
                        "pool's first; with the output's folder and all paths on each")
    parser.add_argument("--on", default="ssh {host}", metavar="COMMAND", help="that starts a process on a host (default: %(default)s)")
    parser.add_argument("--memory-gb", nargs=2, type=float, default=(16, 20), metavar=("FAST", "SLOW"),
                        help="that a rank of each pool may take, for the planner")
    parser.add_argument("--profile-lengths", nargs="+", type=int, help="to profile at (default: --lengths)")
    parser.add_argument("--throttle-gbps", type=float, metavar="GBIT/S", help="traffic of tokens as on such a network")
    parser.add_argument("--busy", action="store_true", help="profile the kernels of one more step of each cell")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="record the tasks of disaggregated cells there")
    parser.add_argument("--no-graphs", action="store_true", help="disaggregated cells without CUDA graphs")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a cell may take")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS",
                        help=f"no cell is begun that would not end in this time from the start (default: {BUDGET})")
    args = parser.parse_args(argv)
    if args.hosts and len(args.hosts) != sum(args.ranks):
        parser.error(f"--hosts names {len(args.hosts)} GPUs; --ranks are {sum(args.ranks)}")
    return args


def main() -> int:
    args = parsed()
    end = time.monotonic() + args.budget
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = cells.read(args.out)
    if other := next((cell["on"] for cell in done if cell.get("on", _where(args)) != _where(args)), None):
        print(f"compare: {args.out} has cells of {other}, and this would be on {_where(args)}: name another file", file=sys.stderr)
        return 2
    if not done and (problems := _machine(args).problems([
            linear_layers(words(model_flags(model, length, args.batch, args.precision, args.micro_batch)))
            for model in args.models for length in args.lengths])):
        print("compare: give other --shares:", *problems, sep="\n  ", file=sys.stderr)
        return 2
    left: list[str] = []
    for model in args.models:
        # Two measurements, each with its limit; where both were made they take no time.
        if not measured_in(_profiles(args, model)).exists() and time.monotonic() + 2 * args.limit > end:
            left.append(f"profiles and all cells of {model}")
            continue
        left += _measure_model(args, model, done, end)
    print(cells.table(done))
    if left:
        print(f"left when {args.budget:g} s were over, for the next call: {'; '.join(left)}")
    return 0


def _measure_model(args: argparse.Namespace, model: str, done: list[dict], end: float) -> list[str]:
    """Measures what is not done yet of a model, as long as there is time; returns what is left."""
    keys = set(map(cells.key, done))
    prices = {length: _prices(args, model, length) for length in args.lengths}
    for length, priced in prices.items():
        if impossible := [name for name in args.systems if name not in priced.predicted]:
            print(f"not possible on {model}, {length}: {'; '.join(f'{name} ({_WHY_NOT[name]})' for name in impossible)}")
    left = []
    for point in _points(args, model, prices):
        cell = {"model": model, "length": point.length, "ranks": list(args.ranks), "system": point.system, "repeat": point.repeat,
                "batch": args.batch, "micro_batch": args.micro_batch, "gbps": args.throttle_gbps, "on": _where(args)}
        if cells.key(cell) in keys:
            continue
        if time.monotonic() + likely_seconds(done, point, args.limit) > end:
            left.append(str(tuple(point)))
            continue
        limit = min(args.limit, end - time.monotonic())
        cell |= _cell(args, prices[point.length], point, limit)
        if "failed" in cell and limit < args.limit:
            left.append(str(tuple(point)))
            continue
        done.append(cell)
        cells.append(args.out, cell)
        print(*point, cell.get("seconds") or cell, "predicted", cell["predicted"], flush=True)
    return left


def _points(args: argparse.Namespace, model: str, prices: dict[int, Prices]) -> Iterator[Point]:
    """All that is asked for and possible: a repetition of all before the next."""
    for repeat in range(args.repeats):
        for length, priced in prices.items():
            for name in args.systems:
                if name in priced.predicted:
                    yield Point(model, length, name, repeat)


def likely_seconds(done: Sequence[dict], point: Point, limit: float) -> float:
    """How long a cell will take: a tenth longer than the longest of its model and length so far, at most its limit."""
    longest = max((cell["took"] for cell in done if (cell["model"], cell["length"]) == (point.model, point.length)
                   and "took" in cell), default=limit)
    return min(limit, 1.1 * longest)


def _cell(args: argparse.Namespace, priced: Prices, point: Point, limit: float) -> dict:
    """Measures, for so many seconds at most; returns the cell without what identifies it."""
    start = time.monotonic()
    # On a cluster the output's folder is what all hosts can read and write.
    with tempfile.TemporaryDirectory(dir=args.out.absolute().parent) as name:
        folder = Path(name)
        system = _system(args, priced, point.system, folder)
        flags = model_flags(point.model, point.length, args.batch, args.precision, args.micro_batch)
        flags["--train-iters"] = STEPS + args.busy
        if args.trace and point.system in priced.compute:
            cell = f"{point.model}-{point.length}-{'-'.join(map(str, args.ranks))}-{point.system.replace(', ', '-')}"
            flags["--hetermoe-trace"] = args.trace / cell
        found = measure(system, words(flags), _machine(args), folder, limit, priced.longer)
    return {**found, **_against_prices(found, priced, point.system), "pools": system.pools, "layout": system.layout,
            "took": time.monotonic() - start}


def _system(args: argparse.Namespace, priced: Prices, name: str, folder: Path) -> System:
    if name in PLANNED:
        return planned(priced.plans[name], folder, _ours(args))
    if name == PIPELINE:
        return pipelined(priced.split, *args.ranks)
    return systems(*args.ranks, _ours(args))[name]


def _against_prices(found: dict, priced: Prices, name: str) -> dict:
    """What a cell says beside its prices: how near it comes to what computing alone takes, and how busy roles are by profiles."""
    said = {"predicted": priced.predicted[name], "bound": priced.bound, "ep_compute": priced.ep_compute}
    if "tasks" in found:
        said |= {"of_bound": priced.bound / found["tasks"], "over_ep_compute": priced.ep_compute / found["tasks"]}
        shares = {role: seconds / found["tasks"] for role, seconds in priced.compute.get(name, {}).items()}
        said["busy"] = {**({"profiled": shares} if shares else {}), **found.get("busy", {})}
    return said


def _where(args: argparse.Namespace) -> dict[str, object]:
    """What all cells of a file, and the profiles beside it, have in common."""
    machine = {"hosts by": args.on} if args.hosts else {"shares": list(args.shares), "gpus": args.gpus}
    return {**machine, "precision": args.precision}


def _machine(args: argparse.Namespace) -> Machine:
    if args.hosts:
        fast = args.ranks[0]
        return Hosts({FAST: args.hosts[:fast], SLOW: args.hosts[fast:]}, args.on, args.out.absolute().parent)
    return Shares(dict(zip((FAST, SLOW), args.shares)), args.gpus)


def _ours(args: argparse.Namespace) -> tuple[str, ...]:
    """Flags of all disaggregated cells."""
    return () if args.no_graphs else ("--hetermoe-cuda-graphs",)


def _profiles(args: argparse.Namespace, model: str) -> Path:
    """The folder of a model's profiles, beside the output file."""
    return args.out.absolute().with_name(f"{args.out.stem}-{model}-{args.ranks[0]}-{args.ranks[1]}")


def _prices(args: argparse.Namespace, model: str, length: int) -> Prices:
    """Profiles the model, once for all its lengths."""
    lengths = sorted(args.profile_lengths or args.lengths)
    fast, slow = args.ranks
    flags = model_flags(model, lengths[-1], args.batch, args.precision, args.micro_batch)
    memory = {pool: size * 1e9 for pool, size in zip((FAST, SLOW), args.memory_gb)}
    cluster = take_profiles(_profiles(args, model), flags, _machine(args), (FAST,) * fast + (SLOW,) * slow, lengths, memory,
                            args.limit, _ours(args))
    return price(cluster, model_shape(model, length), args.batch, VOCABULARY, args.precision, args.throttle_gbps,
                 args.micro_batch, not args.no_graphs)


if __name__ == "__main__":
    sys.exit(main())
