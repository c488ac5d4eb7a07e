"""Ranks of the benchmarks train the same model whichever way it is spread: here on the CPU, in fp32."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(BENCH))

from systems import System, disaggregated, pipelined, stock  # noqa: E402

from megatron_hetermoe.simulator.baselines import Pipeline  # noqa: E402

pytestmark = pytest.mark.slow


def losses(system: System, folder: Path) -> list[float]:
    """Of each step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = len(system.pools)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0",
                   "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCH.parents[1])}
    command = [sys.executable, BENCH / "rank.py", folder / "record", "math", "240", "--", *tiny(num_layers=4, train_iters=3),
               *system.flags("math")]
    logs = [folder / f"log.{rank}" for rank in range(ranks)]
    started = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}, cwd=folder, stdout=log.open("w"),
                                stderr=subprocess.STDOUT) for rank, log in enumerate(logs)]
    assert not any([rank.wait(timeout=300) for rank in started]), "\n".join(log.read_text()[-3000:] for log in logs)
    steps = [json.loads(line) for line in (folder / f"record.{ranks - 1}").read_text().splitlines()]
    assert all(0 < step["tasks"] <= step["seconds"] for step in steps)
    return [step["loss"] for step in steps]


def test_all_ways_to_train_have_one_loss(tmp_path):
    split = Pipeline(1.0, stages=(1, 1), ranks=(1, 1), layers=(3, 1), microbatches=4)
    found = []
    for index, system in enumerate((stock(("fast", "slow")), pipelined(split, 1, 1), disaggregated(("fast",), ("slow",)))):
        (tmp_path / str(index)).mkdir()
        found.append(losses(system, tmp_path / str(index)))
    assert len(found[0]) == 3
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=1e-6)
