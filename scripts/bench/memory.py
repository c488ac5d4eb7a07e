#!/usr/bin/env python3
"""Peak memory of each role against stock expert parallelism, on the same model and batch.

    scripts/bench/memory.py [--ranks 2 2] [--flags --bf16 ...]

Trains a few steps on so many attention and expert ranks, then with stock Megatron on all of these as expert-parallel ranks,
and prints what a rank of each kind took beyond what the process had before its model: on a GPU what torch's allocator had
at most, on the CPU the process' peak in the kernel's books (Linux).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

STEPS = 3
MODEL = {
    "num-layers": 4, "hidden-size": 512, "num-attention-heads": 8, "seq-length": 512, "max-position-embeddings": 512,
    "num-experts": 16, "moe-ffn-hidden-size": 1024, "moe-router-topk": 2, "moe-router-load-balancing-type": "aux_loss",
    "moe-aux-loss-coeff": 0.01, "moe-token-dispatcher-type": "alltoall", "position-embedding-type": "rope",
    "normalization": "RMSNorm", "transformer-impl": "local", "tokenizer-type": "NullTokenizer", "vocab-size": 8000,
    "split": "99,1,0", "micro-batch-size": 1, "global-batch-size": 8, "train-iters": STEPS, "lr": 0.0001,
    "lr-decay-style": "constant", "eval-iters": 0, "eval-interval": 1000, "num-workers": 0, "attention-dropout": 0,
    "hidden-dropout": 0, "seed": 1234,
}
BARE = (
    "swiglu", "disable-bias-linear", "untie-embeddings-and-output-weights", "mock-data",
    "no-create-attention-mask-in-dataloader", "no-persist-layer-norm", "no-masked-softmax-fusion",
    "no-gradient-accumulation-fusion", "no-bias-swiglu-fusion", "no-bias-dropout-fusion", "no-rope-fusion",
)


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--rank"]:
        return train_here(Path(argv[1]), list(argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs=2, type=int, default=(2, 2), metavar=("ATTENTION", "EXPERT"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of Megatron's and ours, for both runs")
    args = parser.parse_args(argv)
    m, n = args.ranks
    model = [word for name, value in MODEL.items() for word in (f"--{name}", str(value))]
    flags = [*model, *(f"--{name}" for name in BARE)]
    layout = ["--hetermoe", "--hetermoe-attention-ranks", str(m), "--hetermoe-expert-ranks", str(n)]
    whole = max(run([*flags, "--expert-model-parallel-size", str(m + n), *without_ours(args.flags)], m + n))
    disaggregated = run([*layout, *flags, *args.flags], m + n)
    print(f"{'rank':36}{'peak':>10}{'over stock':>12}")
    for name, peak in (
        (f"stock, expert-parallel over {m + n}", whole), (f"attention, 1 of {m}", max(disaggregated[:m])),
        (f"experts, 1 of {n}", max(disaggregated[m:])),
    ):
        print(f"{name:36}{peak / 1e6:7.0f} MB{peak / whole:12.2f}")
    return 0


def without_ours(flags: Sequence[str]) -> list[str]:
    """Flags that stock Megatron knows; each of ours has one value."""
    kept = list(flags)
    while any(word.startswith("--hetermoe") for word in kept):
        at = next(index for index, word in enumerate(kept) if word.startswith("--hetermoe"))
        del kept[at:at + 2]
    return kept


def run(flags: Sequence[str], world: int) -> list[float]:
    """Trains on so many ranks here; the bytes that each took at most."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        logs = [Path(folder, f"{rank}.log") for rank in range(world)]
        ranks = [subprocess.Popen(
            [sys.executable, __file__, "--rank", str(Path(folder, str(rank))), *flags], cwd=folder,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        ) for rank, log in enumerate(logs)]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            failed = next(index for index, code in enumerate(codes) if code)
            raise SystemExit(f"rank {failed} ended with {codes[failed]}:\n{logs[failed].read_text()[-3000:]}")
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world)]


# ---------------------------------------------------------------------------------------------- a rank


def train_here(record: Path, flags: list[str]) -> int:
    """Trains as one rank, and writes what it took at most from when its model was built."""
    from megatron_hetermoe import pretrain_gpt
    from megatron_hetermoe.mcore.platform import cpu, wheel

    if cpu.needed():
        cpu.install()
        before, peak = _resident, _peak_resident
    else:
        import torch

        before, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
        if "--hetermoe" not in flags:
            wheel.install()  # stock Megatron could not start from its wheel otherwise
    from megatron.training import training

    start: list[int] = []

    def noting(original: Callable) -> Callable:
        @functools.wraps(original)
        def build(*args, **kwargs):
            start.append(before())
            return original(*args, **kwargs)

        return build

    training.setup_model_and_optimizer = noting(training.setup_model_and_optimizer)
    sys.argv = ["pretrain_gpt", *flags]
    code = pretrain_gpt.main(flags)
    record.write_text(json.dumps(peak() - start[0]))
    return code


def _status(name: str) -> int:
    """A figure of this process in the kernel's books, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _resident() -> int:
    """What is resident now; the peak counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_resident() -> int:
    return _status("VmHWM")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
