"""The harness itself: what it says when ranks fail, and that it leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import tiny
from ranks import RanksFailed, Step, assert_same_steps, run_function, run_ranks


def _gather(rank: int, world: int, factor: int) -> list[int]:
    import torch

    values = [None] * world
    torch.distributed.all_gather_object(values, rank * factor)
    return values


def _raise(rank: int, world: int) -> None:
    if rank == 1:
        raise RuntimeError("rank one gave up")


def _exit(rank: int, world: int) -> None:
    if rank == 1:
        print("going", flush=True)
        sys.exit(2)


def _hang(rank: int, world: int, pids: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    Path(pids, str(rank)).write_text(f"{os.getpid()} {child.pid}")
    if rank == 1:
        _never_returns()


def _never_returns() -> None:
    time.sleep(600)


def _leave_others_hanging(rank: int, world: int) -> None:
    if rank == 0:
        sys.exit(3)
    _never_returns()


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_results_come_back_by_rank():
    assert run_function(_gather, 3, 10) == [[0, 10, 20]] * 3


def test_an_exception_is_shown(tmp_path):
    with pytest.raises(RanksFailed, match="RuntimeError: rank one gave up"):
        run_function(_raise, 2, cwd=tmp_path)


def test_an_exit_code_is_shown():
    with pytest.raises(RanksFailed, match=r"exit codes \[.*, 2\](.|\n)*going"):
        run_function(_exit, 2)


def test_a_hang_names_the_ranks_with_their_stacks_and_leaves_no_process(tmp_path):
    with pytest.raises(RanksFailed) as failure:
        run_function(_hang, 2, str(tmp_path), timeout=3)
    message = str(failure.value)
    assert "after 3 s these ranks were still running: 0, 1" in message  # rank 0 waits in the last barrier
    assert "in _never_returns" in message
    pids = [int(pid) for rank in (0, 1) for pid in (tmp_path / str(rank)).read_text().split()]
    assert not [pid for pid in pids if _alive(pid)]


def test_ranks_that_hang_after_a_failure_are_killed(monkeypatch):
    import ranks

    monkeypatch.setattr(ranks, "GRACE", 1.0)
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"exit codes \[3, -9\]"):
        run_function(_leave_others_hanging, 2, timeout=60)
    assert time.monotonic() - start < 30


def test_a_training_run_that_fails_is_returned(tmp_path):
    run = run_ranks(tiny(sft=True), 2, cwd=tmp_path)
    assert run.exit_codes == [2, 2]
    assert ["--sft is not supported" in output for output in run.output] == [True, False], "one rank a machine says it"
    with pytest.raises(RanksFailed, match="--sft is not supported"):
        run.check()


def test_comparing_steps():
    step = Step(loss={"lm loss": 2.0}, grad_norm=1.0, skipped=0, num_zeros=None, loss_scale=1.0, seconds=0.1, resident=0)
    other = Step(loss={"lm loss": 2.0}, grad_norm=1.1, skipped=0, num_zeros=None, loss_scale=1.0, seconds=0.2, resident=0)
    assert_same_steps([step], [step])
    assert_same_steps([other], [step], rel=0.2)
    with pytest.raises(AssertionError, match="grad norm"):
        assert_same_steps([other], [step], rel=0.01)
    with pytest.raises(AssertionError, match="1 steps against 2"):
        assert_same_steps([step], [step, step])
