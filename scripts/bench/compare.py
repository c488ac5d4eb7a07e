"""Compares ways to train one model on the same mixed cluster: here one GPU in shares of the Multi-Process Service.

    scripts/bench/compare.py --out cells.jsonl [--models D1] [--lengths 4096 8192] [--repeats 2]

Fast ranks (attention) have flash attention, slow ranks (experts) the memory-efficient kernel, and each has its pool's share of
a GPU. On one GPU that is 25% for all: 20% would differ from it about as V100 from A40, but on an H200 losses were NaN there, in
stock Megatron too. On two GPUs, one a pool, --shares 31 25 has that difference. A cell whose loss is no number is not counted.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lab
from lab import Rank
from prices import FAST, SLOW, Prices, price, take_profiles

from megatron_hetermoe.config.plan import MERGED, Plan
from megatron_hetermoe.config.shape import ModelShape

KERNELS = {FAST: "flash", SLOW: "efficient"}  # of attention, for each pool
STEPS, WARM_UP = 9, 4  # routing is uneven at first, and graphs are captured
VOCABULARY = 32_000

# The paper's models: layers, width, experts. Its file names no more; widths inside an expert are Mixtral's 3.5 x hidden.
MODELS = {"D1": (8, 1024, 24), "W1": (4, 2048, 12)}


@dataclass(frozen=True)
class System:
    """A way to train.

    Attributes:
        pools: of each rank.
        flags: beyond the model's, for a rank with that attention kernel.
        blocks: of NCCL on a GPU, for each communicator. Ours wait beside compute, stock's while nothing else runs.
    """

    pools: tuple[str, ...]
    flags: Callable[[str], tuple[str, ...]]
    blocks: int = 1


def stock(pools: Sequence[str]) -> System:
    """Stock expert parallelism over ranks of these pools."""
    return System(tuple(pools), lambda kernel: ("--expert-model-parallel-size", str(len(pools))), blocks=4)


def disaggregated(fast: Sequence[str], slow: Sequence[str], *flags: str) -> System:
    """The fast ranks have attention, the slow ones experts."""
    layout = ("--hetermoe", "--hetermoe-attention-ranks", str(len(fast)), "--hetermoe-expert-ranks", str(len(slow)))
    return System((*fast, *slow), lambda kernel: (*layout, "--hetermoe-attention", kernel, *flags))


def systems(fast: int, slow: int, ours: Sequence[str] = ()) -> dict[str, System]:
    """What needs no plan, with so many ranks of each pool, and flags of all that are ours."""
    pools = (FAST,) * fast, (SLOW,) * slow
    return {
        "EP, all ranks": stock((*pools[0], *pools[1])),
        "EP, fast pool alone": stock(pools[0]),
        "EP, slow pool alone": stock(pools[1]),
        "naive disaggregation": disaggregated(*pools, "--hetermoe-schedule", "sequential", *ours),
        "zebra": disaggregated(*pools, "--hetermoe-weight-gradients", MERGED, *ours),
    }


# Planned when profiles are there: the placement for attention on the fast pool, and the planner's own choice of layout.
PLANNED = ("zebra, Asym-EA", "zebra, planned")
NAMES = (*systems(1, 1), *PLANNED)


def planned(plan: Plan, folder: Path, ours: Sequence[str]) -> System:
    """A plan's layout; each rank gets the GPU of the pool that the plan took it from."""
    paths = {kernel: folder / f"{kernel}.json" for kernel in KERNELS.values()}
    for kernel, path in paths.items():
        path.write_text(replace(plan, attention_kernel=kernel).to_json())
    m = plan.attention_ranks // plan.groups
    pools = (*plan.pools[:m] * plan.groups, *plan.pools[m:] * plan.groups)
    return System(pools, lambda kernel: ("--hetermoe", "--hetermoe-plan", str(paths[kernel]), *ours))


def model_flags(model: str, length: int, batch: int) -> dict[str, object]:
    """Megatron's flags as a recipe has them."""
    layers, hidden, experts = MODELS[model]
    flags = {
        "num-layers": layers, "hidden-size": hidden, "num-experts": experts, "seq-length": length,
        "max-position-embeddings": length, "global-batch-size": batch, "num-attention-heads": hidden // 64,
        "num-query-groups": 8, "ffn-hidden-size": hidden * 7 // 2, "moe-router-topk": 2, "micro-batch-size": 1,
        "moe-token-dispatcher-type": "alltoall", "moe-router-load-balancing-type": "aux_loss",
        "moe-aux-loss-coeff": 0.01, "position-embedding-type": "rope", "normalization": "RMSNorm",
        "transformer-impl": "local", "tokenizer-type": "NullTokenizer", "vocab-size": VOCABULARY, "split": "99,1,0",
        "train-iters": STEPS, "lr": 0.0001, "lr-decay-style": "constant", "log-interval": 100, "eval-iters": 0,
        "eval-interval": 1000, "num-workers": 0, "attention-dropout": 0, "hidden-dropout": 0, "seed": 1234,
    }
    bare = (
        "group-query-attention", "swiglu", "disable-bias-linear", "untie-embeddings-and-output-weights", "bf16",
        "mock-data", "no-create-attention-mask-in-dataloader", "no-persist-layer-norm", "no-masked-softmax-fusion",
        "no-gradient-accumulation-fusion", "no-rope-fusion", "no-check-for-nan-in-loss-and-grad",
    )
    return {f"--{name}": value for name, value in {**flags, **dict.fromkeys(bare, True)}.items()}


def model_shape(model: str, length: int) -> ModelShape:
    """The same as the planner sees it."""
    layers, hidden, experts = MODELS[model]
    return ModelShape(
        layers=layers, moe_layers=tuple(range(1, layers + 1)), experts=experts, topk=2, hidden=hidden,
        expert_ffn=hidden * 7 // 2, dense_ffn=hidden * 7 // 2, shared_expert_ffn=0, gated=True, heads=hidden // 64,
        query_groups=8, head_dim=64, tied_embeddings=False, sequence=length,
    )


def words(flags: dict[str, object]) -> list[str]:
    """Flags as a command line."""
    return [word for flag, value in flags.items() for word in ((flag,) if value is True else (flag, str(value)))]


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
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    keys = {(cell["model"], cell["length"], tuple(cell["ranks"]), cell["system"], cell["repeat"]) for cell in done}
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
                with args.out.open("a") as file:
                    file.write(json.dumps(cell) + "\n")
                print(model, length, name, cell.get("seconds") or cell, "predicted", cell["predicted"], flush=True)
    print(table(done))
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


def table(cells: list[dict]) -> str:
    """The figures as Markdown."""
    lines = ["| model | tokens | ranks | system | sequences/s | spread | predicted | over EP | over the sum of pools |",
             "|---|---|---|---|---|---|---|---|---|"]
    groups: dict[tuple[str, int, str], dict[str, list[dict]]] = {}
    for cell in cells:
        if "seconds" in cell:
            key = cell["model"], cell["length"], "{}:{}".format(*cell["ranks"])
            groups.setdefault(key, {}).setdefault(cell["system"], []).append(cell)
    for (model, length, ranks), by_system in groups.items():
        rates = {name: [cell["batch"] / cell["seconds"] for cell in found] for name, found in by_system.items()}
        median = {name: statistics.median(values) for name, values in rates.items()}
        pools = [median.get(f"EP, {pool} pool alone") for pool in (FAST, SLOW)]
        for name, values in rates.items():
            over = [median[name] / base if base else None
                    for base in (median.get("EP, all ranks"), sum(pools) if all(pools) else None)]
            ratios = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in over)
            predicted = by_system[name][0]["batch"] / by_system[name][0]["predicted"]
            lines.append(f"| {model} | {length} | {ranks} | {name} | {median[name]:.2f} | {min(values):.2f} to {max(values):.2f} "
                         f"| {predicted:.2f} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
