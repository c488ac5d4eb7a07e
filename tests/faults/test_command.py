"""``hetermoe train`` shows once why a run has ended, and leaves no rank behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import tiny
from recipes import recipe_of

ROOT = Path(__file__).parents[2]


def recipe(path):
    path.write_text(recipe_of(tiny(train_iters=100_000, global_batch_size=4),
                              {"attention-ranks": 1, "expert-ranks": 1, "stall-timeout": 3}))
    return path


def ranks(logs):
    """The processes whose output is a rank's log, by rank."""
    found = {}
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            match = re.fullmatch(rf"{re.escape(str(logs))}/rank(\d+)\.log", os.readlink(link))
        except OSError:
            continue
        if match:
            found[int(match[1])] = int(link.parts[2])
    return found


@pytest.mark.parametrize("number, said", [(signal.SIGKILL, "has died"), (signal.SIGSTOP, "is stopped")])
def test_the_reason_is_shown_once(tmp_path, number, said):
    logs = tmp_path / "logs"
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_hetermoe", "train", str(recipe(tmp_path / "r.yaml")), "--keep-logs",
         str(logs)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not any("iteration " in log.read_text(errors="replace") for log in logs.glob("rank1.log")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    os.kill(ranks(logs)[1], number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (128 + 9 if number == signal.SIGKILL else 3)
    assert len(re.findall(rf"^hetermoe: rank 1 \(expert, host .*\) {said}", errors, re.M)) == 1, errors
    assert len(re.findall(r"^hetermoe: rank 0 \(attention, host .*\) awaited .*, since ", errors, re.M)) == 1, errors
    assert "Traceback" not in errors
    assert not ranks(logs)
