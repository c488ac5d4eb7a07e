"""``hetermoe train --emulate`` on a GPU: the losses of ranks that each have all of it, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from gpu_sharing import sharing
from models import tiny
from recipes import recipe_of

from megatron_hetermoe.cli.launch import has_gpu
from megatron_hetermoe.runtime.mps_keeper import PREFIX

ROOT = Path(__file__).parents[2]
MODEL = dict(
    num_layers=3, hidden_size=256, num_attention_heads=8, num_query_groups=4, seq_length=512,
    max_position_embeddings=512, moe_ffn_hidden_size=512, global_batch_size=16, train_iters=8,
)
LAYOUT = {"attention-ranks": 2, "expert-ranks": 2}

pytestmark = pytest.mark.skipif(not has_gpu(), reason="needs a GPU")


def start(folder: Path, env: Mapping[str, str], *words: str, **model: object) -> subprocess.Popen[str]:
    """Starts ``hetermoe train`` of the model in a folder; ``logs`` there has the ranks' output."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe_of(tiny(**{**MODEL, **model}), LAYOUT))
    environment = {**os.environ, **env, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_hetermoe", "train", "recipe.yaml", "--keep-logs", "logs", *words], cwd=folder,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(folder: Path, env: Mapping[str, str], *words: str, **model: object) -> list[float]:
    """Of all steps but the first two: what the log gives for them is an average."""
    output = start(folder, env, *words, **model)
    said = output.communicate(timeout=500)[0]
    logs = "".join(log.read_text() for log in folder.glob("logs/rank*.log"))
    assert output.returncode == 0, said + logs[-5000:]
    print(next((line for line in said.splitlines() if "stands for" in line), "no shares"))
    found = {int(step): float(loss) for step, loss in re.findall(r"iteration +(\d+)/.* lm loss: (\S+)", logs)}
    assert len(found) == MODEL["train_iters"], logs[-5000:]
    return [loss for step, loss in sorted(found.items()) if step > 2]


def services() -> set[str]:
    """Processes and folders of the service that --emulate starts."""
    found = {str(path) for place in ("/tmp", tempfile.gettempdir()) for path in Path(place).glob(f"{PREFIX}*")}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().startswith("nvidia-cuda-mps") and PREFIX.encode() in (
                    process / "environ").read_bytes():
                found.add(process.name)
    return found


@pytest.mark.parametrize("shares, model, words, rel", [
    ("attention=2x25%,expert=2x25%", {}, [], 1e-4),
    ("attention=2x25%,expert=2x20%", {"bf16": True}, ["--hetermoe-experts", "grouped"], 5e-3),
], ids=["fp32", "bf16-grouped"])
def test_shares_change_no_loss(tmp_path, gpu, shares, model, words, rel):
    with sharing(gpu, tmp_path / "service") as env:
        whole = losses(tmp_path / "whole", env, "--", *words, **model)
    before = services()
    divided = losses(tmp_path / "divided", {"CUDA_VISIBLE_DEVICES": gpu}, "--emulate", shares, "--", *words, **model)
    assert divided == pytest.approx(whole, rel=rel)
    assert services() == before


@pytest.mark.parametrize("victim", ["rank", "command", "killed command"])
def test_nothing_is_left_and_the_next_run_starts(tmp_path, gpu, victim):
    before, env = services(), {"CUDA_VISIBLE_DEVICES": gpu}
    process = start(tmp_path, env, "--emulate", "attention=2x25%,expert=2x25%", train_iters=100_000)
    deadline = time.monotonic() + 240
    while "iteration " not in "".join(log.read_text() for log in tmp_path.glob("logs/rank*.log")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.2)
    if victim == "rank":
        os.kill(_rank(process.pid, 3), signal.SIGKILL)
    else:
        process.send_signal(signal.SIGTERM if victim == "command" else signal.SIGKILL)
    process.communicate(timeout=240)
    assert process.returncode != 0
    deadline = time.monotonic() + 120
    while services() - before and time.monotonic() < deadline:  # a killed command waits for nothing
        time.sleep(0.2)
    assert services() == before
    assert losses(tmp_path, env, "--emulate", "attention=2x25%,expert=2x25%")


def _rank(parent: int, rank: int) -> int:
    """The pid of a rank of a command."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_child = (process / "stat").read_text().rpartition(")")[2].split()[1] == str(parent)
            if is_child and f"RANK={rank}".encode() in (process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
    raise AssertionError(f"rank {rank} of process {parent} is not there")
