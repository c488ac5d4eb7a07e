"""Compares ways to train one model on the same mixed cluster: here one GPU in shares of the Multi-Process Service.

    scripts/bench/compare.py --out cells.jsonl [--models D1] [--lengths 4096 8192] [--repeats 2]

Fast ranks (attention) have 25% of the GPU and flash attention, slow ranks (experts) the memory-efficient kernel and
--slow-share of it; 20% would differ from the fast ones about as V100 from A40, but on an H200 losses were NaN there, in
stock Megatron too, so the default is 25%. A cell whose loss is no number is not counted. Cells are interleaved, a repetition of all before the next; each is a line of the
output file, and what is there is not measured again. The table gives medians over repetitions of the median step
(optimizer included, the first two steps left out) with their spread, as sequences a second, and the ratios that
matter: over stock expert parallelism on all ranks, and over the sum of what the two pools do alone.

NCCL must let ranks share a GPU (2.30 with NCCL_MULTI_RANK_GPU_ENABLE=1; preload it where torch's is older).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAST, SLOW = (25, "flash"), (25, "efficient")  # share of the GPU in percent, attention kernel
STEPS, WARM_UP = 7, 2

# The paper's models: layers, width, experts. Its file names no more; widths inside an expert are Mixtral's 3.5 x hidden.
MODELS = {"D1": (8, 1024, 24), "W1": (4, 2048, 12)}


@dataclass(frozen=True)
class System:
    """A way to train.

    Attributes:
        ranks: share and kernel of each rank.
        flags: beyond the model's.
    """

    ranks: tuple[tuple[int, str], ...]
    flags: tuple[str, ...]


def stock(*ranks: tuple[int, str]) -> System:
    """Stock expert parallelism over these ranks."""
    return System(ranks, ("--expert-model-parallel-size", str(len(ranks))))


def disaggregated(*flags: str) -> System:
    """Two attention ranks, fast, and two expert ranks, slow."""
    layout = ("--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2")
    return System((FAST, FAST, SLOW, SLOW), (*layout, *flags))


SYSTEMS = {
    "EP, all ranks": stock(FAST, FAST, SLOW, SLOW),
    "EP, fast pool alone": stock(FAST, FAST),
    "EP, slow pool alone": stock(SLOW, SLOW),
    "naive disaggregation": disaggregated("--hetermoe-schedule", "sequential"),
    "zebra": disaggregated(),
}


def with_share(system: System, percent: int) -> System:
    """The same with another share for slow ranks."""
    return replace(system, ranks=tuple((percent, SLOW[1]) if rank == SLOW else rank for rank in system.ranks))


def model_flags(model: str, length: int, batch: int) -> list[str]:
    """Megatron's flags."""
    layers, hidden, experts = MODELS[model]
    flags = {
        "num-layers": layers, "hidden-size": hidden, "num-experts": experts, "seq-length": length,
        "max-position-embeddings": length, "global-batch-size": batch, "num-attention-heads": hidden // 64,
        "num-query-groups": 8, "ffn-hidden-size": hidden * 7 // 2, "moe-router-topk": 2, "micro-batch-size": 1,
        "moe-token-dispatcher-type": "alltoall", "moe-router-load-balancing-type": "aux_loss",
        "moe-aux-loss-coeff": 0.01, "position-embedding-type": "rope", "normalization": "RMSNorm",
        "transformer-impl": "local", "tokenizer-type": "NullTokenizer", "vocab-size": 32000, "split": "99,1,0",
        "train-iters": STEPS, "lr": 1e-4, "lr-decay-style": "constant", "log-interval": 100, "eval-iters": 0,
        "eval-interval": 1000, "num-workers": 0, "attention-dropout": 0, "hidden-dropout": 0, "seed": 1234,
    }
    bare = (
        "group-query-attention", "swiglu", "disable-bias-linear", "untie-embeddings-and-output-weights", "bf16",
        "mock-data", "no-create-attention-mask-in-dataloader", "no-persist-layer-norm", "no-masked-softmax-fusion",
        "no-gradient-accumulation-fusion", "no-bias-swiglu-fusion", "no-bias-dropout-fusion", "no-rope-fusion",
        "no-check-for-nan-in-loss-and-grad",
    )
    return [*(word for name, value in flags.items() for word in (f"--{name}", str(value))), *map("--{}".format, bare)]


def measure(system: System, flags: Sequence[str], folder: Path, limit: float) -> dict:
    """Trains once; returns the cell's figures, or why there are none."""
    world = len(system.ranks)
    environment = {
        "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4", "NCCL_NVLS_ENABLE": "0",
        "CUDA_DEVICE_MAX_CONNECTIONS": "16", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + (os.getpid() + len(os.listdir(folder.parent))) % 10000), "LOCAL_RANK": "0",
        "PYTHONWARNINGS": "ignore", "BENCH_RANK_SECONDS": str(limit), **os.environ,
        "CUDA_MPS_PIPE_DIRECTORY": str(folder / "mps"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "mps-log"),
    }
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
        Path(environment[name]).mkdir()
    # A daemon for each cell: after a rank was killed it may call the GPU busy for a while.
    subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, check=True)
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    logs = [folder / f"log.{rank}" for rank in range(world)]
    processes = []
    for rank, (share, kernel) in enumerate(system.ranks):
        of_rank = {**environment, "RANK": str(rank), "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(share)}
        processes.append(subprocess.Popen(
            [sys.executable, Path(__file__).with_name("rank.py"), folder / "record", kernel, *flags, *system.flags],
            env=of_rank, stdout=logs[rank].open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        ))
    try:
        codes = [process.wait(timeout=limit + 20) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [None]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["nvidia-cuda-mps-control"], input="quit\n", text=True, env=environment, timeout=60)
    if any(code != 0 for code in codes):
        return {"failed": f"exit codes {codes}", "log": [log.read_text()[-6000:] for log in logs]}
    records = [[json.loads(line) for line in (folder / f"record.{rank}").read_text().splitlines()]
               for rank in range(world)]
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
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--slow-share", type=int, default=SLOW[0], help="percent of the GPU for a slow rank")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a cell may take")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    keys = {(cell["model"], cell["length"], cell["system"], cell["repeat"]) for cell in done}
    for repeat in range(args.repeats):
        for model in args.models:
            for length in args.lengths:
                for name in args.systems:
                    if (model, length, name, repeat) in keys:
                        continue
                    with tempfile.TemporaryDirectory() as folder:
                        figures = measure(
                            with_share(SYSTEMS[name], args.slow_share), model_flags(model, length, args.batch), Path(folder), args.limit)
                    cell = {"model": model, "length": length, "system": name, "repeat": repeat,
                            "batch": args.batch, **figures}
                    done.append(cell)
                    with args.out.open("a") as file:
                        file.write(json.dumps(cell) + "\n")
                    print(model, length, name, cell.get("seconds") or cell, flush=True)
    print(table(done))
    return 0


def table(cells: list[dict]) -> str:
    """The figures as Markdown."""
    lines = ["| model | tokens | system | sequences/s | spread | over EP | over the sum of pools |",
             "|---|---|---|---|---|---|---|"]
    groups: dict[tuple[str, int], dict[str, list[float]]] = {}
    for cell in cells:
        if "seconds" in cell:
            rates = groups.setdefault((cell["model"], cell["length"]), {}).setdefault(cell["system"], [])
            rates.append(cell["batch"] / cell["seconds"])
    for (model, length), rates in groups.items():
        median = {name: statistics.median(values) for name, values in rates.items()}
        pools = [median.get(f"EP, {pool} pool alone") for pool in ("fast", "slow")]
        for name, values in rates.items():
            over = [median[name] / base if base else None
                    for base in (median.get("EP, all ranks"), sum(pools) if all(pools) else None)]
            ratios = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in over)
            lines.append(f"| {model} | {length} | {name} | {median[name]:.2f} | "
                         f"{min(values):.2f} to {max(values):.2f} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
