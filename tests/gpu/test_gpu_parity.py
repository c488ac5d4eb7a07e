"""On GPUs: streams, NCCL channels and freed buffers change nothing against stock Megatron."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny

from megatron_hetermoe.cli.launch import has_gpu

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs a GPU, NCCL 2.30 and the Multi-Process Service")

# Wide enough that kernels run longer than the host needs for the next ones, so a missing wait between streams shows.
MODEL = dict(
    num_layers=3, hidden_size=256, num_attention_heads=8, num_query_groups=4, seq_length=512,
    max_position_embeddings=512, moe_ffn_hidden_size=512, global_batch_size=16, train_iters=12,
    no_check_for_nan_in_loss_and_grad=True, ckpt_format="torch_dist",
)
WORLD = 4
MIXED = {"experts": 8, "layers": {"all": {"e0": ["0-3"], "e1": ["4-7"]}, 2: {"a0": [0], "a1": [1, 2], "e1": ["3-7"]}}}


def train(folder: Path, name: str, world: int, flags: list[str], port: int, env: dict[str, str]) -> list[dict]:
    """Starts ranks, waits, and returns what each step of the last rank returned, which has the loss in every layout."""
    environment = {**os.environ, **env, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"{name}.{rank}.log" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        processes.append(subprocess.Popen(
            [sys.executable, Path(__file__).with_name("gpu_rank.py"), folder / name, *flags], stdout=log.open("w"),
            stderr=subprocess.STDOUT, start_new_session=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": "0"},
        ))
    try:
        codes = [process.wait(timeout=300) for process in processes]  # gpu_rank.py gives up earlier
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert codes == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)
    lines = (folder / f"{name}.{world - 1}").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


class Stock:
    """Stock Megatron with two expert-parallel ranks, each precision once, from weights of its own.

    Args:
        folder: for what it writes.
        env: of ranks that share a GPU.
        model: flags beside MODEL.
    """

    def __init__(self, folder: Path, env: dict[str, str], **model: object):
        self.folder, self.env = folder, env
        self.model = {**MODEL, **model}
        datasets = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0], "datasets")
        assert (datasets / "Makefile").exists(), "stock Megatron runs `make` there; put a Makefile that does nothing"
        train(folder, "weights", 2, tiny(**{**self.model, "train_iters": 1}, save=folder / "weights", save_interval=1,
                                         no_save_optim=True, no_save_rng=True, expert_model_parallel_size=2), 29610, env)
        self._runs: dict[tuple, list[dict]] = {}

    def flags(self, **others: object) -> list[str]:
        """Megatron's, of a run from the common weights."""
        start = {"load": self.folder / "weights", "finetune": True, "no_load_optim": True, "no_load_rng": True}
        return tiny(**{**self.model, **start, **others})

    def steps(self, **precision: object) -> list[dict]:
        """What each step returned."""
        key = tuple(sorted(precision.items()))
        if key not in self._runs:
            self._runs[key] = train(self.folder, f"stock{len(self._runs)}", 2,
                                    self.flags(expert_model_parallel_size=2, **precision), 29620, self.env)
        return self._runs[key]


@pytest.fixture(scope="module")
def stock(shared, tmp_path_factory):
    return Stock(tmp_path_factory.mktemp("gpu"), shared)


BF16 = {"bf16": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
GROUPED = ["--hetermoe-experts", "grouped"]
# Precision, our flags, Megatron's flags beside them, and the bound.
CASES = {
    "fp32": ({}, ["--hetermoe-experts", "sequential"], DISTRIBUTED, 1e-4),
    "bf16": (BF16, ["--hetermoe-experts", "sequential"], DISTRIBUTED, 5e-3),
    "grouped": (BF16, GROUPED, DISTRIBUTED, 5e-3),
    "delayed": (BF16, [*GROUPED, "--hetermoe-weight-gradients", "delayed"], DISTRIBUTED, 5e-3),
    "merged": (BF16, [*GROUPED, "--hetermoe-weight-gradients", "merged", "--hetermoe-wave", "2", "--hetermoe-cuda-graphs"],
               DISTRIBUTED, 5e-3),
    "fp16-experts": ({**BF16, "loss_scale": 1024}, ["--hetermoe-expert-precision", "fp16"], DISTRIBUTED, 5e-3),
    "graphs": (BF16, [*GROUPED, "--hetermoe-cuda-graphs"], DISTRIBUTED, 5e-3),
    "graphs-fp32": ({}, ["--hetermoe-cuda-graphs", "--hetermoe-wave", "3"], {}, 1e-4),
    "overlapped": (BF16, [*GROUPED, "--hetermoe-schedule", "overlapped", "--hetermoe-wave", "2"], DISTRIBUTED, 5e-3),
    "activation-again": (BF16, GROUPED,
                         {**DISTRIBUTED, "recompute_granularity": "selective", "recompute_modules": "moe_act"}, 5e-3),
    "pipeline": (BF16, [*GROUPED, "--hetermoe-wave", "2"],
                 {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}, 5e-3),
    "context": (BF16, GROUPED, {**DISTRIBUTED, "context_parallel_size": 2}, 5e-3),
}


@pytest.mark.parametrize("case", CASES)
def test_same_training(stock, case):
    precision, ours, model, rel = CASES[case]
    reference = stock.steps(**precision)
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2"]
    if "pipeline_model_parallel_size" not in model:  # a stage has one holder of each role
        placement = stock.folder / "placement.yaml"
        placement.write_text(json.dumps(MIXED))
        layout += ["--hetermoe-placement", str(placement), "--hetermoe-trace", str(stock.folder / f"trace-{case}")]
    env = {**stock.env, **({"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if "context_parallel_size" in model else {})}
    found = train(stock.folder, f"ours-{case}", WORLD, [*layout, *ours, *stock.flags(**precision, **model)], 29630, env)
    assert len(found) == len(reference) == MODEL["train_iters"]
    for step, (mine, other) in enumerate(zip(found, reference)):
        assert mine["loss"]["lm loss"] == pytest.approx(other["loss"]["lm loss"], rel=rel), f"step {step}"
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=20 * rel), f"step {step}"
    print(case, "seconds a step:", [round(step["seconds"], 3) for step in found], "stock",
          [round(step["seconds"], 3) for step in reference])
