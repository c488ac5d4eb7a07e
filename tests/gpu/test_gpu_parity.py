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

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs a GPU, and where ranks share one NCCL 2.30 with "
                                "NCCL_MULTI_RANK_GPU_ENABLE=1 in the environment")

# Wide enough that kernels run longer than the host needs for the next ones, so a missing wait between streams shows.
MODEL = dict(
    num_layers=3, hidden_size=256, num_attention_heads=8, num_query_groups=4, seq_length=512,
    max_position_embeddings=512, moe_ffn_hidden_size=512, global_batch_size=16, train_iters=12,
    no_check_for_nan_in_loss_and_grad=True, ckpt_format="torch_dist",
)
MIXED = {"experts": 8, "layers": {"all": {"e0": ["0-3"], "e1": ["4-7"]}, 2: {"a0": [0], "a1": [1, 2], "e1": ["3-7"]}}}


def train(folder: Path, name: str, world: int, flags: list[str], port: int) -> list[dict]:
    """Starts ranks, waits, and returns what each step of the first rank returned."""
    environment = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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
    lines = (folder / f"{name}.0").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Weights, and stock EP 2 from them in each precision."""
    folder = tmp_path_factory.mktemp("gpu")
    datasets = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0], "datasets")
    assert (datasets / "Makefile").exists(), "stock Megatron runs `make` there; put a Makefile that does nothing"
    train(folder, "weights", 2, tiny(**{**MODEL, "train_iters": 1}, save=folder / "weights", save_interval=1,
                                     no_save_optim=True, no_save_rng=True, expert_model_parallel_size=2), 29610)

    def flags(**others) -> list[str]:
        return tiny(**MODEL, **others, load=folder / "weights", finetune=True, no_load_optim=True, no_load_rng=True)

    return folder, flags


@pytest.mark.parametrize(
    "precision, experts, rel",
    [({}, ["--hetermoe-experts", "sequential"], 1e-4),
     ({"bf16": True}, ["--hetermoe-experts", "sequential"], 5e-3),
     ({"bf16": True}, ["--hetermoe-experts", "grouped"], 5e-3),
     ({"bf16": True}, ["--hetermoe-experts", "grouped", "--hetermoe-weight-gradients", "delayed"], 5e-3),
     ({"bf16": True, "loss_scale": 1024}, ["--hetermoe-expert-precision", "fp16"], 5e-3)],
    ids=["fp32", "bf16", "grouped", "delayed", "fp16-experts"],
)
def test_same_training(stock, request, precision, experts, rel):
    folder, flags = stock
    name = request.node.callspec.id
    reference = train(folder, f"stock-{name}", 2, flags(expert_model_parallel_size=2, **precision), 29620)
    placement = folder / "placement.yaml"
    placement.write_text(json.dumps(MIXED))
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2",
              "--hetermoe-placement", str(placement), *experts, "--hetermoe-trace", str(folder / f"trace-{name}")]
    ours = train(folder, f"ours-{name}", 4, [*layout, *flags(use_distributed_optimizer=True, **precision)], 29630)
    assert len(ours) == len(reference) == MODEL["train_iters"]
    for step, (mine, other) in enumerate(zip(ours, reference)):
        assert mine["loss"]["lm loss"] == pytest.approx(other["loss"]["lm loss"], rel=rel), f"step {step}"
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=20 * rel), f"step {step}"
    print(name, "seconds a step:", [round(step["seconds"], 3) for step in ours], "stock",
          [round(step["seconds"], 3) for step in reference])
