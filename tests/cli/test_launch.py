"""Ranks are started with what they need, and end together, whatever happens."""

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

from megatron_hetermoe.cli.summary import failure

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# In a process of its own: `multiprocessing` has one fork server a process, and this one must not load Megatron.
SCRIPT = """
import sys
from pathlib import Path
from megatron_hetermoe.cli import launch
from megatron_hetermoe.cli.interrupt import interruptible
launch.PRELOAD = "json"
fork, logs, *argv = sys.argv[1:]
if __name__ == "__main__":
    with interruptible(), launch.Ranks(3, argv, {"EXTRA": "x"}, Path(logs), entry="fake_rank",
                                       fork=fork == "fork", grace=1.0) as ranks:
        while ranks.wait(0.2):
            pass
    print(ranks.failed)
    sys.exit(ranks.exit_code())
"""


@pytest.fixture(params=["fork", "spawn"])
def start(request, tmp_path):
    """Starts three fake ranks; their logs are in tmp_path / logs."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE)])

    def started(*argv):
        command = [sys.executable, str(script), request.param, str(tmp_path / "logs"), *argv]
        return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    started.forked = request.param == "fork"
    return started


def logs(tmp_path, pattern, count):
    """All matches of a pattern in the ranks' logs, awaited until there are so many."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        texts = [log.read_text() for log in sorted(tmp_path.glob("logs/rank*.log"))]
        found = [match for text in texts for match in re.findall(pattern, text)]
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{pattern} is {len(found)} times in the logs, not {count}")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(pids):
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if alive(pid)]


def test_each_rank_knows_its_place(start, tmp_path):
    assert start("env").communicate(timeout=30)[0] == "None\n"
    places = [eval(text) for text in logs(tmp_path, r"\{.*\}", 3)]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1", "2"]
    assert len({place["MASTER_PORT"] for place in places}) == 1 and all(place["EXTRA"] == "x" for place in places)
    assert {place["OMP_NUM_THREADS"] for place in places} == ({"1"} if start.forked else {None})


@pytest.mark.parametrize("code", [2, 7])
def test_a_rank_that_fails_ends_the_others(start, tmp_path, code):
    began = time.monotonic()
    process = start("fail", "1", str(code), str(tmp_path))
    assert process.communicate(timeout=30)[0] == "1\n" and process.returncode == code
    assert time.monotonic() - began < 15
    assert_gone(map(int, logs(tmp_path, r"pid (\d+)", 3)))
    assert "this is the reason" in (tmp_path / "logs" / "rank1.log").read_text()


def test_whichever_rank_refuses_first_has_said_why(start, tmp_path):
    """Others are ended then, and may not have come to it."""
    process = start("refuse", "1")
    assert process.communicate(timeout=30)[0] == "1\n" and process.returncode == 2
    assert failure((tmp_path / "logs" / "rank1.log").read_text(), 2) == "hetermoe: 1 problem:\n  - this is refused"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_rank_outlives_the_launcher(start, tmp_path, number):
    process = start("child")
    pids = [int(pid) for pid in logs(tmp_path, r"pid (\d+)", 3)]
    children = [int(pid) for pid in logs(tmp_path, r"child (\d+)", 3)]
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    if number != signal.SIGKILL or start.forked:  # the kernel ends a killed launcher's ranks, not what they started
        pids += children
    else:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    assert_gone(pids)


def test_under_nohup_a_run_outlives_its_terminal():
    script = "import os, signal\nfrom megatron_hetermoe.cli.interrupt import interruptible\n" \
             "with interruptible():\n    os.kill(os.getpid(), signal.SIGHUP)\nprint('is there')"
    ended = subprocess.run(["nohup", sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)},
                           stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (0, "is there\n"), ended.stderr


def test_a_rank_ended_by_a_signal(start, tmp_path):
    process = start("sleep")
    os.kill(int(logs(tmp_path, r"pid (\d+)", 3)[2]), signal.SIGKILL)
    assert process.communicate(timeout=30)[0] == "2\n" and process.returncode == 128 + signal.SIGKILL


def test_data_may_be_loaded_by_processes_of_their_own(tmp_path):
    """Megatron's default: two workers for each rank that reads. Losses are those of a rank that reads by itself."""
    losses = set()
    for workers in (0, 2):
        recipe = tmp_path / f"{workers}.yaml"
        recipe.write_text(recipe_of(tiny(train_iters=2, num_workers=workers), {"attention-ranks": 1, "expert-ranks": 1}))
        ended = subprocess.run([sys.executable, "-m", "megatron_hetermoe", "train", str(recipe)], cwd=tmp_path, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, timeout=120,
                               capture_output=True)
        assert ended.returncode == 0, ended.stderr
        losses.add(re.search(r"loss +(\S+) at step 1, (\S+) at step 2", ended.stdout).groups())
    assert len(losses) == 1
